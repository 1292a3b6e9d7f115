"""The commands, a function each: parsed options in, the function of the package called, what it found printed.

Every command reads and checks the files it is given before it imports what imports torch, so that an error in a file is
reported within seconds.
"""

from argparse import Namespace
from collections.abc import Callable

from rewardmodel.commands.asking import ASKING
from rewardmodel.commands.exporting import EXPORTING
from rewardmodel.commands.judging import JUDGING
from rewardmodel.commands.recipes import RECIPES
from rewardmodel.commands.training import TRAINING

VERBS: dict[str, Callable[[Namespace], int | None]] = {**TRAINING, **JUDGING, **EXPORTING, **ASKING, **RECIPES}
"""Commands by name; each docstring is the command's help."""
