"""Self-Instruct's seed tasks: an instruction with one or several inputs and outputs.

    data.demonstrations.reader = "examples/readers/self_instruct.py:demonstrations"

Every instance of a task is a row; those of one task are one group. Left out: `is_classification`.

Source: https://github.com/yizhongw/self-instruct (data/seed_tasks.jsonl)
"""


def demonstrations(records):
    """Yields a demonstration row for each instance of a task."""
    for task in records:
        for number, instance in enumerate(task["instances"]):
            yield {
                "id": f"{task['id']}-{number}",
                "group": task["id"],
                "input_text": f"{task['instruction']}\n\n{instance['input']}".strip(),
                "output_text": instance["output"].strip(),
                "name": task["name"],
            }
