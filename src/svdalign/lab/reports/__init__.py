"""Tables, figures and pages, made from what ``results.json`` holds.

Nothing here trains, measures, or reads a run folder. Experiments and the command line import it; it
imports only :mod:`svdalign.lab.training.config`. ``plots`` draws, ``page`` fills the template,
``pages`` and ``tables`` say what each kind of result shows.
"""

from .card import card_text
from .frame import frame
from .pages import comparison_page, profile_page, run_page
from .tables import break_even_table, comparison_table, epoch_table, profile_table

__all__ = [
    "break_even_table",
    "card_text",
    "comparison_page",
    "comparison_table",
    "epoch_table",
    "frame",
    "profile_page",
    "profile_table",
    "run_page",
]
