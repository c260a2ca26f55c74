"""Results as pictures, tables and pages; ``results.py`` says what those of a demo are."""
