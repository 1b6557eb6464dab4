"""Context distillation: can a zero-shot student absorb what examples in the prompt give its teacher?"""
