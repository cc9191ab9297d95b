"""Philox4x64-10 and what NumPy makes of it, in plain Python from the papers: the reference for `qexport.runtime.noise`,
and for anyone who writes a player in another language."""

import math
import struct

WORD = 2**64 - 1


class Philox:
    """One image's stream of random numbers; key (seed, image number)."""

    def __init__(self, seed, image):
        self.key, self.counter, self.words = (seed, image), 0, []

    def block(self):
        # Salmon et al. 2011, section 3.3: ten rounds; constants from their table 2 and the golden ratio, sqrt(3) - 1.
        self.counter += 1
        x = [(self.counter >> (64 * i)) & WORD for i in range(4)]
        k0, k1 = self.key
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(b >> 64) ^ x[1] ^ k0, b & WORD, (a >> 64) ^ x[3] ^ k1, a & WORD]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
        return x

    def word32(self):
        if not self.words:
            self.words = [half for word in self.block() for half in (word & 0xFFFFFFFF, word >> 32)]
        return self.words.pop(0)

    def uniform(self):
        return (self.word32() >> 8) * 2.0**-24

    def normal(self):
        """Ziggurat of Marsaglia & Tsang 2000 with 256 layers of equal area and 23 bits of magnitude."""
        while True:
            word = self.word32()
            layer, negative, magnitude = word & 0xFF, (word >> 8) & 1, word >> 9
            x = f32(magnitude * WIDTH[layer])
            if magnitude < INSIDE[layer]:
                return -x if negative else x
            if layer == 0:  # the tail beyond EDGE
                while True:
                    tail = f32(-f32(1 / EDGE) * f32(math.log1p(-self.uniform())))
                    other = f32(-math.log1p(-self.uniform()))
                    if other + other > tail * tail:
                        return f32(-(EDGE + tail)) if (magnitude >> 8) & 1 else f32(EDGE + tail)
            height = (HEIGHT[layer - 1] - HEIGHT[layer]) * self.uniform() + HEIGHT[layer]
            if height < math.exp(-0.5 * x * x):
                return -x if negative else x


def f32(x):
    """Round to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


EDGE = 3.6541528853610088  # where the tail begins, for 256 layers


def _tables():
    area = EDGE * math.exp(-0.5 * EDGE**2) + math.sqrt(math.pi / 2) * math.erfc(EDGE / math.sqrt(2))
    base = area / math.exp(-0.5 * EDGE**2)
    inside, width, height = [0] * 256, [0.0] * 256, [1.0] * 256
    inside[0], width[0] = int(EDGE / base * 2**23), base / 2**23
    width[255], height[255] = EDGE / 2**23, math.exp(-0.5 * EDGE**2)
    edge = EDGE
    for layer in range(254, 0, -1):
        below, edge = edge, math.sqrt(-2 * math.log(area / edge + math.exp(-0.5 * edge**2)))
        inside[layer + 1] = int(edge / below * 2**23)
        width[layer], height[layer] = edge / 2**23, math.exp(-0.5 * edge**2)
    return inside, [f32(w) for w in width], [f32(h) for h in height]


INSIDE, WIDTH, HEIGHT = _tables()
