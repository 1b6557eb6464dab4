"""Context distillation: what examples in the prompt give a teacher, absorbed by a zero-shot student."""
