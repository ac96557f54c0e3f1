"""The verb that adopts python-cqrs's tables, and leads back."""

import argparse
import os
from dataclasses import asdict

from saga_store import adoption
from saga_store.adoption import AdoptionError, Goal, Plan
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.verbs import Verbs

# What python-cqrs calls its tables, if it was told to call them something else.
_NAMES = {"CQRS_SAGA_EXECUTION_TABLE_NAME": "saga_executions", "CQRS_SAGA_LOG_TABLE_NAME": "saga_logs"}

_AFTERWARDS: dict[Goal, str] = {
    "adopt": "Processes of python-cqrs go on working until --finish. Until then --undo leads back.",
    "undo": "python-cqrs has its tables back, with all that was written since; saga-store can't use them any more.",
    "finish": "python-cqrs's own storage doesn't work on these tables any more, and there is no way back.",
}


def register(verbs: Verbs) -> None:
    verb = verbs.add(
        "adopt", _adopt, summary="Make tables that python-cqrs made into saga-store's.", database=True, waits=True
    )
    goal = verb.add_mutually_exclusive_group()
    goal.add_argument(
        "--undo", dest="goal", action="store_const", const="undo", help="give python-cqrs its tables back"
    )
    goal.add_argument(
        "--finish", dest="goal", action="store_const", const="finish", help="drop what only python-cqrs needs, for good"
    )
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="look, and print what would be done (default)")
    how.add_argument("--execute", action="store_true", help="do it")
    verb.add_argument(
        "--rewrite-below",
        metavar="ROWS",
        type=int,
        default=adoption.REWRITE_BELOW,
        help="with fewer rows, rewrite the tables in one transaction; with more, convert rows beside the writers "
        f"(default: {adoption.REWRITE_BELOW})",
    )
    verb.set_defaults(goal="adopt")


def _adopt(given: argparse.Namespace, console: Console) -> int:
    _refuse_other_names()
    plan = adoption.plan(given_url(given), given.goal, schema=given.schema, rewrite_below=given.rewrite_below)
    if not given.execute:
        console.product(_described(plan), executed=False, **asdict(plan))
        return Exit.FAILED if plan.refusals else Exit.DONE
    where = {"schema": given.schema, "lock_wait": given.lock_wait, "report": console.report}
    if given.goal == "finish":
        steps = adoption.finish(given_url(given), **where)
    else:
        carry_out = adoption.undo if given.goal == "undo" else adoption.adopt
        steps = carry_out(given_url(given), rewrite_below=given.rewrite_below, **where)
    done = f"{len(steps)} steps done. {_AFTERWARDS[plan.goal]}" if steps else _nothing(plan)
    console.result(done, executed=True, goal=plan.goal, schema=plan.schema, steps=[asdict(step) for step in steps])
    return Exit.DONE


def _refuse_other_names() -> None:
    names = {variable: os.environ.get(variable) or name for variable, name in _NAMES.items()}
    renamed = tuple(f"{variable}={names[variable]}" for variable, name in _NAMES.items() if names[variable] != name)
    if renamed:
        raise AdoptionError(
            "python-cqrs has other names for its tables here, and saga-store has only one each. Stop its processes, "
            "rename the tables to saga_executions and saga_logs, and unset:",
            renamed,
        )


def _nothing(plan: Plan) -> str:
    return {
        "adopt": f"nothing to do: the tables in schema {plan.schema} are saga-store's, and up to date",
        "undo": f"nothing to do: the tables in schema {plan.schema} are python-cqrs's",
        "finish": f"nothing to do: nothing of python-cqrs's is left in schema {plan.schema}",
    }[plan.goal]


def _described(plan: Plan) -> str:
    rows = [f"  {name}: {count:,} rows" for name, count in sorted(plan.rows.items())]
    lines = [f"schema {plan.schema}", *rows]
    if plan.refusals:
        return "\n".join([*lines, f"can't {plan.goal}:", *(f"  {refusal}" for refusal in plan.refusals)])
    if not plan.steps:
        return "\n".join([*lines, _nothing(plan)])
    for number, step in enumerate(plan.steps, 1):
        lines += ["", f"{number}. {step.name}", f"   keeps waiting: {step.blocks}"]
        lines += [f"     {statement};" for statement in step.statements]
    option = "" if plan.goal == "adopt" else f" --{plan.goal}"
    return "\n".join(
        [*lines, "", f"Nothing was changed: saga-store adopt{option} --execute does it.", _AFTERWARDS[plan.goal]]
    )
