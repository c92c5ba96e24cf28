"""Targets: each subpackage turns canonical `cppass::` ops into what one target runs."""
