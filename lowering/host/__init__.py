"""The host target: gloo functional collectives and efficient CPU attention. Needs torch alone."""
