"""One latent prefix, made once from a text, that two different frozen language models read in the text's place."""
