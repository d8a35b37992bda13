"""Several adapters on one base: attach, switch, add, merge, unmerge and detach.

python examples/switching.py
"""

from __future__ import annotations

import torch

import loratune as lt


def main() -> None:
    """Shows that every switch is exact."""
    model, tokenizer = lt.load("loratune/pocket"), lt.load_tokenizer("loratune/pocket")
    ids = torch.tensor([tokenizer("The quick brown fox").input_ids], device=model.device)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    bare = logits()
    for seed, name in enumerate(("sql", "french")):
        lt.attach(model, lt.LoraConfig(r=8), name=name, seed=seed)
        for path, parameter in model.named_parameters():
            if path.endswith("lora_B"):  # random values instead of training, because a new adapter changes nothing
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(seed))

    lt.activate(model, "sql")
    sql = logits()
    lt.activate(model, None)
    print("bare base is unchanged:       ", torch.equal(logits(), bare))
    lt.activate(model, {"sql": 0.5, "french": 0.5})
    print("half of each differs from sql:", not torch.allclose(logits(), sql))
    lt.merge(model, "sql")
    print("merged equals unmerged:       ", torch.allclose(logits().float(), sql.float(), rtol=0.1, atol=0.5))
    lt.unmerge(model)
    lt.activate(model, "sql")
    print("unmerging restores every bit: ", torch.equal(logits(), sql))
    lt.detach(model)
    print("detaching restores the model: ", torch.equal(logits(), bare))


if __name__ == "__main__":
    main()
