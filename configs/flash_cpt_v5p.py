"""LLaDA2.0-flash from its autoregressive base: continued pretraining by the published schedule.

    llada-data corpus/ --tokenizer checkpoints/flash-base --out data/cpt/tokens --holdout 0.001
    llada-train --distributed --config configs/flash_cpt_v5p.py --workdir /mnt/runs/flash_cpt

Hardware: 128 TPU v5p chips (v5p-256), 95 GB each; every host runs the second command,
and the same /mnt/runs is on every host.
Model: 102.89 B parameters. They, AdamW's moments and gradients, in float32, take 16 bytes of each:
12.9 GB per chip.
Start: checkpoints/flash-base holds the weights of Ling-flash-base-2.0, whose names are alike, with
LLaDA2.0-flash's config.json and tokenizer in place of Ling's, whose model type is not read here.

Not run on a TPU, and not tried on the published files. Time, memory in use and result are unknown,
and so is whether another mesh would be better.

Published (arXiv:2512.15745, section 4): block size 1, 4, 32, 64, then the whole row as masked
diffusion for most of the corpus, then step by step back to 32; one document sees no other; noise on
masked embeddings at first. Rate of the experts' bias and z-loss: the public script of the base.
Ours, because nobody publishes them: steps of each phase, tokens per step, learning rates, the size
and length of that noise, that block size 1 predicts a token at its own place, and the mesh.
"""

from ml_collections import ConfigDict

TOKENS = "data/cpt/tokens"
ROW_LENGTH = 4096
PEAK, FLOOR = 2e-5, 2e-6


def get_config() -> ConfigDict:
    """The run: 24,000 steps of 2,097,152 tokens."""
    constant = {"kind": "constant", "peak": PEAK}

    def blocks(stage: str, block_length: int, steps: int, rate: dict) -> dict:
        return {
            "name": f"{stage}_{block_length}",
            "objective": "block_diffusion",
            "block_length": block_length,
            "steps": steps,
            "learning_rate": rate,
        }

    start = {
        "name": "warmup_1",
        "objective": "autoregressive_same",
        "steps": 500,
        "learning_rate": constant | {"warmup_steps": 200},
    }
    warmup = [blocks("warmup", length, 500, constant) for length in (4, 32, 64)]
    stable = {
        "name": "stable",
        "objective": "masked_diffusion",
        "steps": 18_000,
        "learning_rate": constant,
    }
    decay = [blocks("decay", length, 500, constant) for length in (2048, 1024, 512, 256, 128, 64)]
    last = blocks("decay", 32, 1000, {"kind": "linear", "peak": PEAK, "floor": FLOOR})
    packing = {
        "row_length": ROW_LENGTH,
        # Documents start at multiples of 64, the largest block of the warmup. Larger blocks of the
        # decay end with their document; aligning documents to those would leave rows half empty.
        "block_length": 64,
    }
    return ConfigDict(
        {
            "seed": 0,
            "batch_size": 512,
            # Ranks of `expert` see the same rows, and each would compute their attention again.
            "mesh": {"data": 1, "fsdp": 128, "expert": 1, "tensor": 1},
            "model": {"init_from": "checkpoints/flash-base"},
            "data": {"sources": [{"path": TOKENS}], "packing": packing},
            "phases": [start, *warmup, stable, *decay, last],
            "loss": {
                "z_loss_weight": 3.5e-6,
                "mask_embedding_noise": 1.0,
                "mask_embedding_noise_steps": 1000,
            },
            "router": {"bias_update_rate": 1e-3},
            "compute": {"dtype": "bfloat16", "attention": "tiles", "remat": "full"},
            "checkpoint": {"every_steps": 500, "keep_last": 3, "keep_every_steps": 2000},
            "eval": {
                "data": {
                    "sources": [{"path": f"{TOKENS}/heldout"}],
                    "packing": packing,
                    "shuffle": False,
                    "num_epochs": 1,
                },
                "every_steps": 1000,
                "block_lengths": [32, 0],
                "num_batches": 8,
            },
            "log": {"every_steps": 10},
        }
    )
