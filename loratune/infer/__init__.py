"""The trained model in use: tokens from prompts (`engine`) and what they are worth (`evaluate`)."""
