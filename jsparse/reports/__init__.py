"""How results are shown: tables and JSON, progress bars, figures, what they were measured on."""
