"""Judging what models make (judges, the table of a run) and listening to it (clips, a page)."""
