"""Rows made up for tests of reports and pages."""

EVIL = 'a|b <script>alert("x")</script> & [bold]x[/] \\ `c` ünï 中'
LAYER = {"weights": 10, "density": 0.5, "bits": 4, "macs": 90}


def row(name, method="m", top1=90.0, size=1000, **more):
    cost = {"macs": 500, "bops": 16_000, "sparse_bops": 8_000 * size / 1000, "bops_float_activations": 64_000,
            "weights": 100, "kept_weights": 50, "density": 0.5, "mean_bits": 4.0}
    return {"name": name, "method": method, "task": "digits", "network": "net", "seed": 0, "top1_float": top1 + 0.25,
            "top1_integer": top1, "baseline_top1": 95.5, "bytes": size, "float32_bytes": 4000, "dense_macs": 700,
            "bytes_split": {"codes": size - 10, "header": 10}, "cost": cost, "paper": {},
            "accounting": {"bits": {}, "ratios": {"data_only": 12.5, "prune_quantize_huffman": 9.0}},
            "layers": {"conv1": dict(LAYER), "fc": {**LAYER, "index_bits": 5, "levels": 15}}, "paper_mode_bytes": 900,
            "difficulty": {"data": "train", "knobs": 3, "lines": 60, "cpu_seconds": 1.25}, "notes": {},
            "checkpoint": {"digest": "d", "source": "s"}, "budget": {}, **more}


def full(name, method="m", **more):
    """A row with all that a page reads."""
    return row(name, method, **{"n_test": 10_000, "hardware": {"energy_ratio_skipping": 0.05, "cycles_channels": 9000},
                                "commit": "abc", **more})
