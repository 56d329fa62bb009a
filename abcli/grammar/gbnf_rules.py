"""The rules of a grammar as plain lists, and what makes a set of rules unfit for llama.cpp.

llama.cpp keeps every place where a rule may stand as a stack and expands each stack until it begins with
characters (llama_grammar_advance_stack). "Leading" below means: reachable in that expansion without reading
a character, that is behind nothing but items that may be empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from abcli.errors import GrammarError

TERMINAL = -1  # one or more characters; every other item is the number of a rule
MAX_CHAIN = 2000
MAX_EXPANSIONS = 10_000
MAX_ALL_EXPANSIONS = 4_000_000
# llama.cpp's time for a token grows with the cube of this number, or faster: of the same text in optional parts 64 took
# it 1.3 seconds, 100 took 7.5.
MAX_SKIPPED = 64

_AMBIGUITY_HINT = "let alternatives differ in their first characters, or use fewer of them"


class Rules:
    """Rules by number; a rule is a list of alternatives, an alternative a list of items."""

    def __init__(self) -> None:
        self.alternatives: list[list[list[int]] | None] = []
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._lines: list[int] = []

    def __len__(self) -> int:
        return len(self.alternatives)

    def identify(self, name: str, line: int) -> int:
        """The number of the rule `name`, a new one at its first mention."""
        if name not in self._numbers:
            self._numbers[name] = self._append(name, line)
        return self._numbers[name]

    def generate(self, owner: int) -> int:
        """The number of a new rule for a part of the rule `owner`."""
        return self._append(self._names[owner], self._lines[owner])

    def _append(self, name: str, line: int) -> int:
        self.alternatives.append(None)
        self._names.append(name)
        self._lines.append(line)
        return len(self.alternatives) - 1

    def define(self, rule: int, alternatives: list[list[int]]) -> None:
        """Give a rule its alternatives."""
        self.alternatives[rule] = alternatives

    def is_defined(self, rule: int) -> bool:
        """Whether the rule has alternatives yet."""
        return self.alternatives[rule] is not None

    def defined(self) -> list[list[list[int]]]:
        """All alternatives; raises GrammarError for a rule without any, or if there is no `root`."""
        for rule, alternatives in enumerate(self.alternatives):
            if alternatives is None:
                raise GrammarError(
                    f"line {self._lines[rule]} of the grammar uses the rule {self._names[rule]!r}, "
                    "which is defined nowhere",
                    "define it, or correct its name",
                )
        if "root" not in self._numbers:
            raise GrammarError("the grammar has no rule 'root'", "name the rule to start with root")
        return [alternatives for alternatives in self.alternatives if alternatives is not None]

    def name(self, rule: int) -> str:
        """The name of a rule, or of the named rule it is a part of."""
        return self._names[rule]


def check_rules(rules: Rules) -> None:
    """Raise GrammarError for rules llama.cpp would refuse, abort on or expand without end."""
    alternatives = rules.defined()
    empty = _may_be_empty(alternatives)
    edges, starts = _leading_edges(alternatives, empty)
    components, order = _components([[target for target, _ in out] for out in edges])
    for rule, out in enumerate(edges):
        # A last item leaves the stack before it is expanded: only other cycles grow.
        if any(components[target] == components[rule] and not is_last for target, is_last in out):
            raise GrammarError(
                f"the rule {rules.name(rule)!r} of the grammar begins with itself (left recursion)",
                "let it begin with something that is not empty, or use a repetition like (...)*",
            )
    begins = _reaching(edges, {rule for rule, count in enumerate(starts) if count})
    for rule in range(len(edges)):
        if rule not in begins and not empty[rule]:
            raise GrammarError(
                f"the rule {rules.name(rule)!r} of the grammar never comes to a character",
                "give it an alternative that does not begin with itself",
            )
    _check_expansions(rules, alternatives, empty, edges, starts, components, order)


def left_recursive_rule(rules: Rules) -> str | None:
    """The name of a rule that may begin with itself, also where that does not grow; None if there is none."""
    alternatives = rules.defined()
    edges, _starts = _leading_edges(alternatives, _may_be_empty(alternatives))
    components, _order = _components([[target for target, _ in out] for out in edges])
    found = (rule for rule, out in enumerate(edges) if any(components[target] == components[rule] for target, _ in out))
    return next((rules.name(rule) for rule in found), None)


def _may_be_empty(rules: list[list[list[int]]]) -> list[bool]:
    """Which rules match the empty text; linear in the size of the rules."""
    empty = [False] * len(rules)
    missing: list[int] = []
    owners: list[int] = []
    uses: list[list[int]] = [[] for _ in rules]
    for rule, alternatives in enumerate(rules):
        for sequence in alternatives:
            if TERMINAL not in sequence:
                for item in sequence:
                    uses[item].append(len(owners))
                missing.append(len(sequence))
                owners.append(rule)
    queue = deque({owner for owner, count in zip(owners, missing, strict=True) if count == 0})
    for rule in queue:
        empty[rule] = True
    while queue:
        for sequence_index in uses[queue.popleft()]:
            missing[sequence_index] -= 1
            owner = owners[sequence_index]
            if missing[sequence_index] == 0 and not empty[owner]:
                empty[owner] = True
                queue.append(owner)
    return empty


def _leading_edges(rules: list[list[list[int]]], empty: list[bool]) -> tuple[list[list[tuple[int, bool]]], list[int]]:
    """Per rule: the rules it may begin with (and whether as the last item), and its leading terminals."""
    edges: list[list[tuple[int, bool]]] = []
    starts: list[int] = []
    for alternatives in rules:
        out: list[tuple[int, bool]] = []
        terminals = 0
        for sequence in alternatives:
            for position, item in enumerate(sequence):
                if item == TERMINAL:
                    terminals += 1
                    break
                out.append((item, position == len(sequence) - 1))
                if not empty[item]:
                    break
        edges.append(out)
        starts.append(terminals)
    return edges, starts


def _postorder(edges: list[list[int]], roots: list[int]) -> list[list[int]]:
    """The trees of a depth-first search, one per root that no earlier tree holds, each in postorder."""
    seen = [False] * len(edges)
    trees = []
    for root in roots:
        if seen[root]:
            continue
        seen[root] = True
        tree: list[int] = []
        path = [(root, iter(edges[root]))]
        while path:
            node, targets = path[-1]
            target = next((t for t in targets if not seen[t]), None)
            if target is None:
                tree.append(node)
                path.pop()
            else:
                seen[target] = True
                path.append((target, iter(edges[target])))
        trees.append(tree)
    return trees


def _components(edges: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """The strongly connected component of every rule, and the components, sources first (Kosaraju)."""
    finished = [node for tree in _postorder(edges, list(range(len(edges)))) for node in tree]
    backward: list[list[int]] = [[] for _ in edges]
    for node, targets in enumerate(edges):
        for target in targets:
            backward[target].append(node)
    members = _postorder(backward, finished[::-1])
    component = [0] * len(edges)
    for index, nodes in enumerate(members):
        for node in nodes:
            component[node] = index
    return component, members


def _reaching(edges: list[list[tuple[int, bool]]], goals: set[int]) -> set[int]:
    """The rules from which some rule of `goals` can be reached."""
    backward: list[list[int]] = [[] for _ in edges]
    for node, out in enumerate(edges):
        for target, _ in out:
            backward[target].append(node)
    reached, queue = set(goals), deque(goals)
    while queue:
        for node in backward[queue.popleft()]:
            if node not in reached:
                reached.add(node)
                queue.append(node)
    return reached


def _leading(sequence: list[int], empty: list[bool]) -> Iterator[tuple[int, int]]:
    """(position, rule) of the rules that a sequence may begin with."""
    for position, item in enumerate(sequence):
        if item == TERMINAL:
            return
        yield position, item
        if not empty[item]:
            return


def _check_expansions(
    rules: Rules,
    alternatives: list[list[list[int]]],
    empty: list[bool],
    edges: list[list[tuple[int, bool]]],
    starts: list[int],
    components: list[int],
    order: list[list[int]],
) -> None:
    """Bound the stacks one stack may expand to, and the depth and time of llama.cpp's search for recursion."""
    expansions = [0] * len(order)
    chains = [0] * len(order)
    skipped = [0] * len(order)
    total = 0
    for index in range(len(order) - 1, -1, -1):
        members = order[index]
        outside = [components[t] for m in members for t, _ in edges[m] if components[t] != index]
        expansions[index] = sum(1 + starts[m] for m in members) + sum(expansions[c] for c in outside)
        chains[index] = len(members) + max((chains[c] for c in outside), default=0)
        total += expansions[index] * len(members)
        if chains[index] > MAX_CHAIN:
            raise GrammarError(
                f"the rule {rules.name(members[0])!r} of the grammar leads through more than {MAX_CHAIN} rules",
                "use fewer rules that begin with another rule",
            )
        behind_empty = (pair for m in members for sequence in alternatives[m] for pair in _leading(sequence, empty))
        skipped[index] = max(
            (skipped[components[t]] + (position > 0) for position, t in behind_empty if components[t] != index),
            default=0,
        )
        if skipped[index] > MAX_SKIPPED:
            raise GrammarError(
                f"the rule {rules.name(members[0])!r} of the grammar has more than {MAX_SKIPPED} parts after each "
                "other that may all be empty",
                "use fewer of them",
            )
        # Checked at once: without a bound these numbers grow exponentially.
        if expansions[index] > MAX_EXPANSIONS:
            raise _ambiguous(rules.name(members[0]))
        if total > MAX_ALL_EXPANSIONS:
            raise GrammarError(
                f"the rules of the grammar can begin in more than {MAX_ALL_EXPANSIONS:,} ways", _AMBIGUITY_HINT
            )
    for rule, sequences in enumerate(alternatives):
        for sequence in sequences:
            behind = 0
            for item in reversed(sequence):
                first = 1 if item == TERMINAL else expansions[components[item]]
                behind = first + (behind if item != TERMINAL and empty[item] else 0)
                if behind > MAX_EXPANSIONS:
                    raise _ambiguous(rules.name(rule))


def _ambiguous(name: str) -> GrammarError:
    return GrammarError(
        f"the rule {name!r} of the grammar can begin in more than {MAX_EXPANSIONS:,} ways", _AMBIGUITY_HINT
    )
