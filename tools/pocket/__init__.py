"""How the model in the box was made: corpus, tokenizer, pretraining, and the two data sets of the demo."""
