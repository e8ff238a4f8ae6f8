"""Speed as ratios: every quantity beside one training step of the same model and batch, in the same run."""
