"""What a suite needs from the hub, brought here before anything runs: bases and data sets.

For clusters whose compute nodes have no network: `snakemake fetch` where there is one. Nothing is
pretrained, prepared or scored. Jobs find a base in the results, a data set in the hub's own cache.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from ballast.bases.build import make_base
from ballast.layout import Layout
from ballast.locks import held
from ballast.ready import spec_of_base
from ballast.sources import rows
from ballast.tasks import read_tasks


def fetch(plan: pd.DataFrame, layout: Layout, report: Callable[[str], None]) -> int:
    """Download the bases and data sets of a plan that come from the hub; returns their number.

    Raises DataError for what cannot be downloaded.
    """
    tasks = read_tasks(layout.tasks)
    bases = [spec_of_base(plan, name) for name in dict.fromkeys(plan["base"])]
    count = 0
    for base in bases:
        if "hub" in base["spec"]["source"]:
            folder = layout.base(base["name"], base["key"])
            with held(folder, base["name"], report):
                made = make_base(base["spec"], folder, report)
            report(f"{base['name']}: {made['model']}")
            count += 1
    blocks = [own for base in bases for own in base["entries"].values()]
    entries = [item for own in blocks for item in own.items()]
    wanted = {(task, split) for task, entry in entries for split in entry["sizes"]}
    for task in sorted({task for task, _ in wanted if tasks[task].source["reader"] == "hub"}):
        for split in sorted(split for name, split in wanted if name == task):
            rows(tasks[task].source, split, 1)
        report(f"{task}: {tasks[task].source['dataset']}")
        count += 1
    return count
