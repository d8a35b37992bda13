"""Inference: tokens from prompts (`engine`), evaluation of answers (`evaluate`), opening folders (`opened`)."""
