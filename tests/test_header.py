"""C headers of compressed networks: a C compiler takes them without a warning and reads the same numbers."""

import shutil
import subprocess

import pytest
import torch
from torch import nn

from methods.core.artifact import (
    ActivationQuantizer,
    Affine,
    Codebook,
    CompressedModel,
    CompressedTensor,
    Levels,
    Window,
)
from methods.core.errors import CompressError, ConfigError, GraphError
from methods.core.fit.calibrate import calibrate
from methods.core.fit.quantize import fit_symmetric, quantize
from methods.core.graph.build import apply, assemble, weight_layers
from methods.engine.exact import IntegerNetwork
from methods.engine.export import to_c_header
from methods.engine.opened import Opened

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")
FRAME = '#include <math.h>\n#include <stdio.h>\n#include "net.h"\n'


def run(folder, program):
    """What a C program that includes net.h prints, as numbers; the compiler must be silent."""
    (folder / "main.c").write_text(FRAME + program)
    built = subprocess.run(["cc", "-Wall", "-Wextra", "-std=c99", "-Werror", "-o", folder / "main", folder / "main.c",
                            "-lm"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([folder / "main"], capture_output=True, text=True, check=True).stdout
    return torch.tensor([float(word) for word in printed.split()], dtype=torch.float64)


def printing(expression, count):
    return f'int main(void) {{ for (int i = 0; i < {count}; i++) printf("%.17g ", (double)({expression})); return 0; }}'


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


ROWS = torch.tensor([0.1, 1 / 3, 0.7, 2.0, 5.0, 1e-3])
ONE = "net_0_scale[0] * (q - net_0_zero[0])"
GRIDS = {
    "affine": (Affine(ROWS, ints(3, -2, 0, 1, 0, -1)), 4, "net_0_scale[i / 10] * (q - net_0_zero[i / 10])"),
    "unsigned": (Affine(torch.tensor(0.3), torch.tensor(200, dtype=torch.int32), signed=False), 8, ONE),
    "wide": (Affine(torch.tensor(1e-7), torch.tensor(5, dtype=torch.int32)), 12, ONE),
    "levels": (Levels(ROWS, ints(-3, -1, 1, 3)), 2, "net_0_scale[i / 10] * net_0_levels[q]"),
    "table": (Codebook(torch.randn(300)), 9, "net_0_table[q]"),
    "table with 0": (Codebook(torch.tensor([0.0, 101.813484, 1e-42, 3e38])), 2, "net_0_table[q]"),
}


@needs_compiler
@pytest.mark.parametrize("kind", GRIDS)
def test_weights_are_those_of_the_file(tmp_path, kind):
    grid, bits, expression = GRIDS[kind]
    net, (low, high) = nn.Sequential(nn.Linear(10, 6)).eval(), grid.code_range(bits)
    tensor = CompressedTensor.of(torch.randint(low, high + 1, (6, 10)), grid, bits, torch.rand(6, 10) < 0.6)
    written = to_c_header(assemble(net, {"0": tensor}), net, tmp_path / "net.h")
    assert 0 < tensor.kept < 60 and written.bytes == (tmp_path / "net.h").stat().st_size
    assert written.layers == {"0": {"unsigned": "uint8_t", "wide": "int16_t", "table": "int16_t"}.get(kind, "int8_t")}
    found = run(tmp_path, printing(expression.replace("q", "net_0_codes[i]"), 60))
    assert torch.equal(found.float().reshape(6, 10), tensor.decode())


class Net(nn.Module):
    """Geometry of all kinds, batch norms with and without factors, a linear."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, (2, 1), (1, 0), bias=False)
        self.b = nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4)
        self.bn_a, self.bn_b, self.fc = nn.BatchNorm2d(4), nn.BatchNorm2d(8, affine=False), nn.Linear(8 * 4 * 6, 3)
        for norm in (self.bn_a, self.bn_b):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(self.bn_a.weight, -1, 2)
        nn.init.uniform_(self.bn_a.bias, -1, 1)

    def forward(self, x):
        x = torch.relu(self.bn_a(self.a(x)))
        return self.fc(torch.flatten(torch.relu(self.bn_b(self.b(x))), 1))


PROGRAM = """
static int code(double x, double step, const int32_t *c) {
    double q = nearbyint(x / step) + c[0];
    return (int)(q < c[1] ? c[1] : q > c[2] ? c[2] : q);
}
static void conv(const int8_t *w, const float *scale, const int32_t *s, const int32_t *g, const float *factor,
                 const float *offset, double step, const int32_t *c, const double *x, int high, int wide, double *y) {
    int rows = (high + g[2] + g[4] - g[6] * (s[2] - 1) - 1) / g[0] + 1;
    int columns = (wide + g[3] + g[5] - g[7] * (s[3] - 1) - 1) / g[1] + 1;
    for (int o = 0; o < s[0]; o++) for (int r = 0; r < rows; r++) for (int k = 0; k < columns; k++) {
        int32_t sum = 0;
        for (int i = 0; i < s[1]; i++) for (int u = 0; u < s[2]; u++) for (int v = 0; v < s[3]; v++) {
            int h = r * g[0] - g[2] + u * g[6], l = k * g[1] - g[3] + v * g[7], from = o / (s[0] / g[8]) * s[1] + i;
            if (h < 0 || h >= high || l < 0 || l >= wide) continue;
            int q = code(x[(from * high + h) * wide + l], step, c);
            sum += w[((o * s[1] + i) * s[2] + u) * s[3] + v] * (q - c[0]);
        }
        y[(o * rows + r) * columns + k] = fmax(factor[o] * scale[o] * step * sum + offset[o], 0);
    }
}
#define CONV(n, x, h, w, y) conv(net_##n##_codes, net_##n##_scale, net_##n##_shape, net_##n##_window, \\
    net_##n##_factor, net_##n##_offset, net_##n##_step[0], net_##n##_code, x, h, w, y)
int main(void) {
    static double x[] = INPUT, p[96], q[192];
    CONV(a, x, 8, 8, p);
    CONV(b, p, 4, 6, q);
    for (int o = 0; o < net_fc_shape[0]; o++) {
        int32_t sum = 0;
        for (int i = 0; i < net_fc_shape[1]; i++)
            sum += net_fc_codes[o * net_fc_shape[1] + i] * (code(q[i], net_fc_step[0], net_fc_code) - net_fc_code[0]);
        printf("%.9g\\n", net_fc_factor[o] * net_fc_scale[o] * net_fc_step[0] * sum + net_fc_offset[o]);
    }
    return 0;
}
"""


@needs_compiler
def test_a_network_runs_in_c(tmp_path):
    """The network of the header, in integers, by a program of thirty lines."""
    net, x = Net().eval(), torch.randn(64, 2, 8, 8)
    weights = {name: quantize(layer.weight, fit_symmetric(layer.weight, 8), 8)
               for name, layer in weight_layers(net).items()}
    made = assemble(net, weights)
    made = assemble(net, weights, activations=calibrate(apply(made, net), x, 8))
    Opened(made, net).to_c_header(tmp_path / "net.h")
    values = ", ".join(f"{value:.9g}" for value in x[0].reshape(-1).tolist())
    found, want = run(tmp_path, PROGRAM.replace("INPUT", f"{{{values}}}")), IntegerNetwork(made, net)(x[:1])[0]
    assert float((found - want).abs().max()) < 1e-3 * float(want.abs().max())
    text = (tmp_path / "net.h").read_text()
    assert "bn_" not in text.split("#include")[1] and "fc_bias" not in text  # they are in factor and offset


@needs_compiler
def test_what_stays_float_is_written(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).eval()
    tensor = quantize(net[4].weight, fit_symmetric(net[4].weight, 4), 4)
    ranges = {"4": ActivationQuantizer(1 / 3, 7, 4)}
    to_c_header(assemble(net, {"4": tensor}, activations=ranges), net, tmp_path / "net.h")
    for expression, want in (("0_weight[i]", net[0].weight.flatten()), ("2_running_var[i]", net[2].running_var),
                             ("4_offset[i]", net[4].bias), ("4_code[i]", torch.tensor([7, 0])),
                             ("4_step[0]", torch.full((2,), 1 / 3, dtype=torch.float64))):
        assert torch.equal(run(tmp_path, printing(f"net_{expression}", 2)), want.detach().double()), expression


def of_linear(**rest):
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    tensor = quantize(net[0].weight, fit_symmetric(net[0].weight, 8), 8)
    for name, value in rest.items():
        net.register_buffer(name, value)
    return net, assemble(net, {"0": tensor})


@pytest.mark.parametrize("value, words", [
    (torch.tensor([1.0, float("inf")]), "tensor buffer is not finite"), (torch.zeros(0), "tensor buffer is empty"),
    (torch.tensor([2**31]), "tensor buffer holds 2147483648..2147483648: a header holds integers of 32 bits")])
def test_tensors_that_c_cannot_have_are_named(tmp_path, value, words):
    net, made = of_linear(buffer=value)
    with pytest.raises(CompressError, match=words):
        to_c_header(made, net, tmp_path / "net.h")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(tmp_path):
    net, made = of_linear()
    with pytest.raises(ConfigError, match="a name in C begins with a letter"):
        to_c_header(made, net, tmp_path / "8bit.h")
    net, made = of_linear(**{"0_codes": torch.ones(1)})
    with pytest.raises(CompressError, match=r"tensors 0\.codes and 0_codes would both be called net_0_codes"):
        to_c_header(made, net, tmp_path / "net.h")
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")).eval()
    made = assemble(net, {"0": quantize(net[0].weight, fit_symmetric(net[0].weight, 8), 8)})
    with pytest.raises(GraphError, match="layer 0 pads with reflect"):
        to_c_header(made, net, tmp_path / "net.h")
    net, made = of_linear()
    made = CompressedModel(made.weights, made.rest, {"0": ActivationQuantizer(0.1)}, {"0": Window(4, (0, 2, 4))})
    with pytest.raises(GraphError, match="input of 0 goes through a bit window"):
        to_c_header(made, net, tmp_path / "net.h")
    with pytest.raises(ConfigError, match="windows = 'keep': allowed are refuse, drop"):
        to_c_header(made, net, tmp_path / "net.h", windows="keep")
    assert not list(tmp_path.iterdir())
    assert to_c_header(made, net, tmp_path / "net.h", windows="drop").bytes
