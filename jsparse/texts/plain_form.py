def with_input(a, b):
    return f"{a}\n\n### Input:\n{b}"
