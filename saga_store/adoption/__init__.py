"""Adopt the tables that python-cqrs made, in place, with the sagas in them, while its processes go on working.

``plan`` looks and changes nothing; ``adopt`` leads to the tables of this package, ``undo`` back, and ``finish`` drops
what only python-cqrs's processes need. Each takes the database as ``saga_store.schema`` does, and each may be killed
at any point and run again. docs/adoption.md tells an operator's side of it.
"""

from saga_store.adoption.errors import AdoptionError
from saga_store.adoption.plan import REWRITE_BELOW, Goal, Plan
from saga_store.adoption.run import adopt, finish, plan, undo
from saga_store.adoption.steps import Step

__all__ = ["REWRITE_BELOW", "AdoptionError", "Goal", "Plan", "Step", "adopt", "finish", "plan", "undo"]
