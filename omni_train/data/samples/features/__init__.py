"""What the encoders are given: log-mel frames of sound, patches of images and video."""
