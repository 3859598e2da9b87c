"""Images a second of the built-in model, with the environment the local runner gives and without it.

    python -m benchmarks.sampling

Each setting is a process of its own, as the C library reads its environment when it starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from rsi_jobs.runners.local import SHARED_ENV, STAGE_ENV

BATCH, BATCHES, STEPS, GUIDANCE = 64, 3, 12, 3.0


def measure(flush: bool) -> float:
    import torch

    from rsi_jobs.diffusion import base_folder, unet
    from rsi_jobs.diffusion.noise import candidate_noise

    torch.set_num_threads(2)
    torch.set_flush_denormal(flush)
    model = unet.load(base_folder("shapes:base"), device="cpu", dtype=torch.float32, checkpoint=None)
    texts = unet.encode(model, ["a large red circle above a small blue square on white"] * BATCH)
    uncond, noise = unet.encode(model, [""]), candidate_noise(list(range(BATCH)), model.latent_shape)
    unet.sample(model, texts, uncond, noise, steps=2, guidance=GUIDANCE, scheduler="dpm++")
    began = time.perf_counter()
    for _ in range(BATCHES):
        unet.sample(model, texts, uncond, noise, steps=STEPS, guidance=GUIDANCE, scheduler="dpm++")
    return BATCH * BATCHES / (time.perf_counter() - began)


def main() -> None:
    if len(sys.argv) > 1:
        print(measure(sys.argv[1] == "flush"))
        return
    plain = 0.0
    for name, env, flush in (
        ("plain", {}, "keep"),
        ("waiting threads sleep", SHARED_ENV, "keep"),
        ("memory is kept", STAGE_ENV, "keep"),
        ("memory is kept, denormals are 0 (the local runner)", STAGE_ENV, "flush"),
    ):
        rates = [
            float(
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.sampling", flush],
                    env=os.environ | env, capture_output=True, text=True, check=True,
                ).stdout.split()[-1]
            )
            for _ in range(3)
        ]  # fmt: skip
        rate = sorted(rates)[1]
        plain = plain or rate
        print(f"{name:52} {rate:6.1f} images/s  {rate / plain:.2f} x plain", flush=True)


if __name__ == "__main__":
    main()
