"""python -m swsurgery"""

from swsurgery.cli import entry

entry()
