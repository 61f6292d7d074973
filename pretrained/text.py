"""Frozen text encoders: any text model of transformers, and the text stage of Make-An-Audio 3.

Importing this module makes them known to flashaudio.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashaudio import TEXT_ENCODERS, InputError, TextConfig, named


def hub_model(auto: type, source: str, **how):
    """auto.from_pretrained(source) with a one-line error; never runs code that comes with it."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **how)
    except Exception as e:                          # transformers and the hub have many
        cause = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{source}: not loaded by {auto.__name__} ({cause})") from e


def pretrained_width(source: str) -> int:
    """Width D of the token states of a transformers text model."""
    from transformers import AutoConfig
    config = hub_model(AutoConfig, source)
    return getattr(config, "text_config", config).hidden_size


class PretrainedText(nn.Module):
    """A frozen text model of transformers (CLAP's text tower, T5, BERT ...) -> its token states.

    Padding is masked inside the model, as in its own training, and its states are set to zero. The
    model is no submodule: its weights are not ours to save again with every stage.
    """
    trained = False

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, ClapTextModel
        kind = hub_model(AutoConfig, config.encoder).model_type
        loader = ClapTextModel if kind.startswith("clap") else AutoModelForTextEncoding
        model = hub_model(loader, config.encoder).eval().requires_grad_(False)
        if model.config.hidden_size != width:
            raise InputError(f"{config.encoder} has width {model.config.hidden_size}, "
                             f"the backbone's context_dim is {width}")
        self.frozen = [model]
        self.tokenizer = hub_model(AutoTokenizer, config.encoder)
        self.max_length = config.max_length

    def _apply(self, fn, recurse: bool = True):     # .to(device) reaches the model all the same
        self.frozen[0]._apply(fn)
        return super()._apply(fn, recurse)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> ids and mask, (B, 2, N)."""
        held = self.tokenizer(captions, padding="max_length", truncation=True,
                              max_length=self.max_length, return_tensors="pt")
        return torch.stack([held.input_ids, held.attention_mask], 1)

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or what `tokenize` returns -> context (B, N, D)."""
        model = self.frozen[0]
        ids = captions if isinstance(captions, Tensor) else self.tokenize(captions)
        ids, mask = ids.to(model.device).unbind(1)
        return model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


class MakeAnAudioText(nn.Module):
    """The text stage of Make-An-Audio 3: BERT and a projection read the caption, T5 its structured
    form -> 77 + 77 tokens.

    A structured caption is "<object& start>@<object& end>" and follows the plain one: "a bell, then
    rain <bell& start>@<rain& end>". Where there is none it is "<caption& all>". The music model has
    T5 alone. No masks: padding is attended to.
    """
    trained = False

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        from transformers import BertConfig, BertModel, T5Config, T5EncoderModel
        self.max_length = config.max_length
        self.sources = config.tokenizers
        self.tokenizers = []                        # loaded when the first caption comes
        t5 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config.t5))
        if config.bert:
            bert = BertModel(BertConfig(**config.bert))
            projection = named(linear1=nn.Linear(bert.config.hidden_size, width, bias=False),
                               linear2=nn.Linear(width, width, bias=False),
                               layer_norm=nn.LayerNorm(width))
            self.caption_encoder = named(base=bert, projection=projection)
            self.t5_transformer = t5
        else:
            self.transformer = t5
        self.requires_grad_(False)

    def load_tokenizers(self) -> list:
        if not self.tokenizers:
            from transformers import AutoTokenizer
            self.tokenizers = [hub_model(AutoTokenizer, source) for source in self.sources]
        return self.tokenizers

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> ids (B, 154): 77 for BERT and 77 for T5; of the music model (B, 77)."""
        plain, structured = [], []
        for caption in captions:
            before, _, after = caption.partition("<")
            if after:
                plain.append(before.strip())
                structured.append(f"<{after}")
            else:
                plain.append(before)
                structured.append(f"<{before}& all>" if before else "")
        texts = [plain, structured] if hasattr(self, "caption_encoder") else [captions]
        ids = [tokenizer(text, padding="max_length", truncation=True, max_length=self.max_length,
                         return_tensors="pt").input_ids
               for tokenizer, text in zip(self.load_tokenizers(), texts)]
        return torch.cat(ids, 1)

    def forward(self, captions: list[str] | Tensor) -> Tensor:
        """Captions, or ids as from `tokenize` -> context (B, 154, D)."""
        ids = captions if isinstance(captions, Tensor) else self.tokenize(captions)
        if not hasattr(self, "caption_encoder"):
            return self.states(self.transformer, ids)
        bert_ids, t5_ids = ids.chunk(2, dim=1)
        projection = self.caption_encoder.projection
        x = projection.linear1(self.states(self.caption_encoder.base, bert_ids))    # (B, 77, D)
        x = projection.layer_norm(x + projection.linear2(F.gelu(x)))
        return torch.cat([x, self.states(self.t5_transformer, t5_ids)], 1)

    @staticmethod
    def states(model: nn.Module, ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


TEXT_ENCODERS["make-an-audio"] = MakeAnAudioText
TEXT_ENCODERS["transformers"] = PretrainedText      # every other name
