"""Features that the encoders take: log-mel frames of sound, patches of images and video."""
