"""How attention is computed: the table of implementations, and one file or folder for each."""
