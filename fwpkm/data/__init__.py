"""What models are trained and asked on."""
