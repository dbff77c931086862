"""What MemoryLedger does for each request, written out: one function for each combination of kinds of rules.

A loop that asks each rule what it is takes twice as long. There are few combinations, however many callers: a function
is compiled for each, and gets a caller's keys and numbers.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.limits import Plan

# Of a rule: has it room? `return` ends with nothing taken.
_ASK = {
    "rate": """
    at{i} = full_at.get(key{i}, now)
    if at{i} < now: at{i} = now
    level{i} = at{i} - now
    at{i} += {takes}
    if at{i} - now > room{i}: return None
""",
    "slots": """
    ops{i} = slots.get(key{i})
    level{i} = 0 if ops{i} is None else len(ops{i})
    if level{i} >= limit{i}: return None
""",
    "budget": """
    budget{i} = budgets.get(key{i}) or made(rule{i})
    level{i} = spent, reserved = budget{i}.spent, budget{i}.reserved
    left = limit{i} - spent - reserved
    amount, least = held[{held}].amount, held[{held}].least
    if not amount or left < (amount if least is None else least): return None
    if amount > left: amount = left
    if not granted or amount < granted: granted = amount
""",
}
# All had room: take it.
_TAKE = {
    "rate": """
    full_at[key{i}] = at{i}
""",
    "slots": """
    if ops{i} is None: slots[key{i}] = {{op}}
    else: ops{i}.add(op)
""",
    "budget": """
    budget{i}.held[op] = budget{i}.held.get(op, 0) + granted
    budget{i}.reserved += granted
""",
}
_GIVE = {
    "rate": """
    told = used[{used}]
    if told is not None and told != held[{held}].amount: move(key{i}, (told - held[{held}].amount) * unit{i})
""",
    "slots": """
    ops = slots.get(key{i})
    if ops is not None:
        ops.discard(op)
        if not ops: del slots[key{i}]
""",
    "budget": """
    budget = budgets.get(key{i}) or made(rule{i})
    reserved = budget.held.pop(op, None)
    if reserved is not None:
        told = {told}
        budget.reserved -= reserved
        budget.spent += reserved if told is None else told
""",
}
_NUMBERS = {
    "rate": ("key{i}", "room{i}", "unit{i}"),
    "slots": ("key{i}", "limit{i}"),
    "budget": ("key{i}", "limit{i}", "rule{i}"),
}


def passes(plan: Plan) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """(take, give, what both get as `numbers`).

    take(op, held, now, full_at, slots, budgets, made, numbers) → (levels, granted), or None: one has no room.
    give(op, held, used, slots, budgets, made, move, numbers)
    """
    numbers: list[Any] = []
    for _, rule in plan.rules:
        numbers += {
            "rate": (rule.key, rule.room, rule.unit if rule.varies else rule.amount * rule.unit),
            "slots": (rule.key, rule.limit),
            "budget": (rule.key, rule.limit, rule),
        }[rule.kind]
    take, give = _written(tuple((rule.kind, rule.varies, held, plan.told(rule)) for held, rule in plan.rules))
    return take, give, tuple(numbers)


@functools.lru_cache(maxsize=256)
def _written(rules: Sequence[tuple[str, bool, int, int | None]]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of each rule: its kind, do requests take amounts of their own, the set that says how much, who tells the use."""
    names, asked, taken, given = [], "", "", ""
    for i, (kind, varies, held, used) in enumerate(rules):
        takes = f"held[{held}].amount * unit{i}" if varies else f"unit{i}"
        words = {"i": i, "held": held, "takes": takes, "used": used, "told": None if used is None else f"used[{used}]"}
        names += [name.format(i=i) for name in _NUMBERS[kind]]
        asked += _ASK[kind].format_map(words)
        taken += _TAKE[kind].format_map(words)
        given += _GIVE[kind].format_map(words) if kind != "rate" or used is not None else ""
    unpacked = f"    {', '.join(names)}, = numbers\n"
    levels = ", ".join(f"level{i}" for i in range(len(rules)))
    text = (
        f"def take(op, held, now, full_at, slots, budgets, made, numbers):\n{unpacked}    granted = 0{asked}{taken}"
        f"    return [{levels}], granted\n"
        f"def give(op, held, used, slots, budgets, made, move, numbers):\n{unpacked}{given}"
    )
    space: dict[str, Any] = {}
    exec(text, space)  # noqa: S102 - made of the pieces above and of numbers
    return space["take"], space["give"]
