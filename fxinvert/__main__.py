"""`python -m fxinvert` is `fxinvert`."""

from fxinvert.cli import app

app(prog_name="fxinvert")
