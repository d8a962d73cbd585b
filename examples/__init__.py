"""Whole programs that use every room; `jsparse demo` is one of them."""
