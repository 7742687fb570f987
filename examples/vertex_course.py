"""The cells of Google Cloud's RLHF course, scaled down to a model without sense: a minute or two.

    python examples/vertex_course.py        (from the folder that holds examples/)

Needs `pip install "amenable[kfp]"`. The rows are made of examples/tiny.jsonl in the course's shape:
prompts end with "[summary]: ", candidates begin with a space. docs/vertex.md has the rest.
"""

import json
import math
from pathlib import Path

from kfp import compiler

from amenable.pipeline.vertex import PipelineJob, rlhf_pipeline

FOLDER = Path("runs/vertex-course")


def write(name: str, rows: list[dict[str, object]]) -> str:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


lines = Path("examples/tiny.jsonl").read_text(encoding="utf-8").splitlines()
source = [json.loads(line) for line in lines]
prompts = [{"input_text": f"{row['input_text']}\n\n[summary]: "} for row in source]
pairs = [
    {**prompt, "candidate_0": f" {row['output_text']}", "candidate_1": " No.", "choice": 0}
    for prompt, row in zip(prompts, source, strict=True)
]
EPOCHS = 1
parameter_values = {
    "preference_dataset": write("preferences.jsonl", pairs[:60]),
    "prompt_dataset": write("prompts.jsonl", prompts[60:100]),
    "eval_dataset": write("eval.jsonl", prompts[100:]),
    "large_model_reference": "tiny",  # the course: llama-2-7b
    "target_sequence_length": 16,
    "reward_model_train_steps": math.ceil(60 / 64) * EPOCHS,
    "reinforcement_learning_train_steps": math.ceil(40 / 64) * EPOCHS,
    "reward_model_learning_rate_multiplier": 1.0,
    "reinforcement_learning_rate_multiplier": 1.0,
    "kl_coeff": 0.1,
    "instruction": "Summarize in less than 50 words",
}

package_path = str(FOLDER / "rlhf_pipeline.yaml")
compiler.Compiler().compile(pipeline_func=rlhf_pipeline, package_path=package_path)
job = PipelineJob(
    display_name="tutorial-rlhf-tuning",
    template_path=package_path,
    pipeline_root=str(FOLDER),
    parameter_values=parameter_values,
)
job.run()
