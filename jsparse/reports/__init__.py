"""How results are shown: tables and JSON, progress bars, figures, and what they were measured on."""
