"""How results are shown: tables and JSON, progress bars, figures."""
