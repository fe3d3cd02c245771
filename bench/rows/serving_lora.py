"""The peer of `rows.serving`: one LoRA adapter of peft a task, switched for each request, behind the same HTTP.

    python -m qtuning_fast.bench.rows.serving_lora RUN PORT TASKS CORES

It answers one request at a time: peft sets one adapter for the whole model. The adapters are random, of rank 8 on the
query and the value of each layer, as in peft's examples; heads are as large as those of the other rows.
"""

import sys
import threading
from pathlib import Path
from typing import Any

RANK = 8


class LoraModel:
    """A base model with many adapters.

    Args:
        base_model: name or folder.
        tasks: how many.
    """

    def __init__(self, base_model: str, tasks: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from qtuning_fast.lifelong.base_models import load_base_model

        torch.manual_seed(0)
        base, self._tokenizer = load_base_model(base_model)
        config = LoraConfig(r=RANK, target_modules=["query", "value"], init_lora_weights=False)
        self._model: Any = get_peft_model(base, config, adapter_name="task-0000")
        for number in range(1, tasks):
            self._model.add_adapter(f"task-{number:04d}", config)
        self._model.eval()
        width = base.config.hidden_size
        self._heads = torch.nn.Parameter(torch.randn(tasks, 2, width) / width**0.5, requires_grad=False)
        self._lock = threading.Lock()

    def answer(self, text: str, task: str) -> dict[str, Any]:
        """Switch to the task's adapter and answer one text."""
        import torch

        with self._lock, torch.no_grad():
            self._model.set_adapter(task)
            inputs = self._tokenizer([text], return_tensors="pt", truncation=True, max_length=64)
            features = self._model(**inputs).last_hidden_state.mean(1)
            features = features / features.square().mean(1, keepdim=True).sqrt()
            outputs = (features @ self._heads[int(task.removeprefix("task-"))].mT).softmax(-1)[0].tolist()
        return {"task": task, "outputs": dict(zip(("no", "yes"), outputs))}


def main(arguments: list[str] | None = None) -> int:
    run, port, tasks, cores = sys.argv[1:] if arguments is None else arguments
    import torch
    import uvicorn
    from fastapi import FastAPI

    from qtuning_fast.model.checked_files import read_json
    from qtuning_fast.serving.schema import Question

    torch.set_num_threads(int(cores))
    model, app = LoraModel(read_json(Path(run) / "run.json")["about"]["base_model"], int(tasks)), FastAPI()

    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/answers")
    def answers(question: Question) -> dict[str, Any]:
        return {"answers": [model.answer(text, question.task or "") for text in question.texts]}

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
