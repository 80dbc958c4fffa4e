"""``ckd-fed recommend`` and ``export``: use what a run has trained."""

from __future__ import annotations

import argparse
from typing import Any

from ckd_fed.commands.places import at_home, home_option, output_folder


def add_commands(commands: Any) -> None:
    """Add this family to the command's sub-parsers."""
    home = home_option("runs are in its runs/")
    recommend = commands.add_parser("recommend", parents=[home], help="a run's recommendations for a user, and which modality speaks for each")
    recommend.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    recommend.add_argument(
        "--user", required=True, metavar="ID", help="the user's id in the source, or the number where the dataset has no users.json"
    )
    recommend.add_argument("--k", type=int, default=20, help="items at most (by default 20)")
    recommend.add_argument("--json", action="store_true", help="one JSON object a line instead of a table; index is the item's number in the dataset")
    recommend.set_defaults(action=at_home(_recommend))
    export = commands.add_parser(
        "export",
        parents=[home],
        help="write a run's embeddings (safetensors) and ranked lists (JSON lines)",
        description="Write embeddings.safetensors, top_items.jsonl, and the source's ids of the embeddings' rows, users.json and items.json.",
    )
    export.add_argument("run", metavar="RUN", help="name of a run, or its folder")
    export.add_argument("--output", metavar="DIR", help="folder to write to; by default export/ in the run's folder")
    export.add_argument("--k", type=int, default=20, help="items a user (by default 20)")
    export.set_defaults(action=at_home(_export))


def _recommend(arguments: argparse.Namespace) -> None:
    import json

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ckd_fed.analysis.history import read_history
    from ckd_fed.analysis.locate import find_run
    from ckd_fed.analysis.recommend import find_user, recommend
    from ckd_fed.analysis.student import load_student

    student = load_student(read_history(find_run(arguments.run)))
    found = recommend(student, find_user(student.dataset, arguments.user), arguments.k)
    item_ids = student.dataset.item_ids
    if arguments.json:
        for one in found:
            row = {"item": item_ids[one.item], "index": one.item, "margin": one.margin}
            print(json.dumps({**row, "contributions": one.contributions, "speaks": one.speaks}, ensure_ascii=False))
        return
    title = f"user {escape(arguments.user)}: {len(found)} items, training and validation items left out"
    table = Table(title=title, title_justify="left")
    for column in ("rank", "item", "index", "margin", *student.backbone.modalities, "speaks for it"):
        table.add_column(column, justify="left" if column == "speaks for it" else "right", overflow="fold" if column == "item" else "ellipsis")
    for rank, one in enumerate(found, start=1):
        added = [f"{one.contributions[m]:+.3f}" for m in student.backbone.modalities]
        table.add_row(str(rank), escape(item_ids[one.item]), str(one.item), f"{one.margin:.3f}", *added, one.speaks)
    Console(width=None if Console().is_terminal else 110).print(table)
    print("item: its id in the source; index: its number in the dataset.")
    print("margin: how much the item is preferred to the user's average item; under a modality: how much of it goes when the modality is absent.")


def _export(arguments: argparse.Namespace) -> None:
    from ckd_fed.analysis.export import export
    from ckd_fed.analysis.history import read_history
    from ckd_fed.analysis.locate import find_run
    from ckd_fed.analysis.student import load_student

    directory = find_run(arguments.run)
    folder = output_folder(arguments.output, directory / "export")
    history = read_history(directory)
    for path in export(load_student(history), history, folder, arguments.k):
        print(path)
