"""Looking only: the plan of a model, the rule of each node, the list of rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

import fxinvert
from fxinvert.commands.config import PostTrainConfig
from fxinvert.commands.inputs import EXAMPLE_ROWS, method_of, options_of, output_key
from fxinvert.errors import DataError, NoRuleError
from fxinvert.estimating import estimate
from fxinvert.report import node_rows, nodes_table, print_json, rule_rows, rules_table
from fxinvert.report.rules_page import rules_page
from fxinvert.rules import RuleSet
from fxinvert.sources import import_module, load_data, load_model
from fxinvert.training.batch import Arguments


def show_plan(
    config: PostTrainConfig,
    shapes: Sequence[tuple[int, ...]],
    samples: int,
    console: Console,
    as_json: bool = False,
) -> None:
    """Shows how a model would be split, the rule of every node, whether its inverse can be made, and what it costs.

    Args:
        config: names the model and, unless shapes are given, the data.
        shapes: of the model's inputs, without the batch.
        samples: how many there will be to train on.
        console: where to show it.
        as_json: whether to print JSON instead.

    Raises:
        FxInvertError: something named is not there, or the model cannot be traced or cut so.
    """
    torch.manual_seed(config.seed)
    model = load_model(config.model, config.weights, config.device, config.pretrained)
    rules = fxinvert.default_rules()
    example = example_of(config, shapes)
    graph = fxinvert.trace(model, example, output=output_key(config.supervised_output))
    plan = fxinvert.partition(graph, config.segments, cuts=config.cuts)
    costs, problem = None, ""
    try:
        fxinvert.invert(graph)
        costs = estimate(
            model,
            example,
            plan,
            samples=samples,
            batch=config.batch_size,
            chunk=config.chunk,
            method=method_of(config),
            schedule=config.schedule,
            only=config.only,
            share=config.share,
            recalibrate=config.recalibrate,
            output=output_key(config.supervised_output),
        )
    except NoRuleError as error:
        problem = str(error)
    if as_json:
        found = {"nodes": node_rows(graph, rules)} | plan.to_dict() | {"problem": problem}
        print_json(found | {"sweep": None if costs is None else costs.to_dict()})
        return
    console.print(nodes_table(graph, rules))
    console.print(plan)
    if costs is None:
        console.print(f"This model cannot be inverted yet: {problem}", style="red")
        return
    console.print(costs)


def show_rules(modules: Sequence[str], console: Console, as_json: bool = False) -> None:
    """Lists the rules, after importing modules that add some.

    Raises:
        DataError: a module cannot be imported.
    """
    rules = _rules_with(modules)
    if as_json:
        print_json(rule_rows(rules))
        return
    console.print(rules_table(rules))
    console.print(f"{len(rules)} rules")


def rules_markdown(modules: Sequence[str]) -> str:
    """The page of rules, after importing modules that add some.

    Raises:
        DataError: a module cannot be imported.
    """
    return rules_page(_rules_with(modules))


def _rules_with(modules: Sequence[str]) -> RuleSet:
    for name in modules:
        import_module(name, "--import", name)
    return fxinvert.default_rules()


def example_of(config: PostTrainConfig, shapes: Sequence[tuple[int, ...]]) -> Arguments:
    if bool(shapes) == bool(config.data):
        given = "both are given" if shapes else "neither is given"
        raise DataError(
            f"either data or, with --shape, the shape of each input without the batch is needed, not both; {given}"
        )
    if not shapes:
        return load_data(config.data, options_of(config)).example_inputs(EXAMPLE_ROWS, config.device)
    wrong = next((shape for shape in shapes if min(shape) < 1), None)
    if wrong:
        raise DataError(f"--shape {','.join(map(str, wrong))}: every size must be at least 1")
    return tuple(torch.rand(2, *shape).to(config.device) for shape in shapes)
