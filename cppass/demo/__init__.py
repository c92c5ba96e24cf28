"""The demonstration that `cppass run` shows: a Hugging Face model on one device and on P ranks, compared and timed."""
