"""Other people's weights: public checkpoints and vocoders."""
