"""Texts and tasks that several rooms need: documents, tokenizers, passkeys, questions."""
