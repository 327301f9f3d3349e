"""Data: from text to the micro-batches of an optimizer step: corpus, tokenizer, tokens, sample order, loader.

Nothing here starts or talks to a process: where ranks matter, they are plain numbers.
"""
