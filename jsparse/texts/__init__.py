"""Texts and tasks that several packages need: documents, tokenizers, passkeys, questions."""
