// Every tier that this program was compiled for and its machine can run, against `base`: built and run by
// tests/unit/test_tier_emulated.py for a machine that is not here.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "gf256.hpp"
#include "kernels.hpp"
using namespace snapshotd;
int main() {
    std::vector<const ErasureTier*> tiers;
#if defined(__aarch64__)
    tiers = {&kErasureNeon};
#else
    for (auto* t : {&kErasureAvx2, &kErasureAvx512, &kErasureGfniAvx2, &kErasureGfniAvx512})
        if (t->supported()) tiers.push_back(t);
#endif
    long cases = 0, bad = 0;
    for (auto* t : tiers) {
        for (unsigned k : {1u, 2u, 3u, 4u, 7u, 10u, 21u})
            for (unsigned m = 1; m <= 4; ++m)
                for (int off = 0; off < 3; ++off)
                    for (size_t bytes : {512ul, 1536ul, 700ul, 37ul}) {
                        std::vector<std::vector<byte>> d(k, std::vector<byte>(bytes + 64)),
                            a(m, std::vector<byte>(bytes + 64, 7)), b = a;
                        for (auto& x : d)
                            for (auto& y : x) y = static_cast<byte>(rand());
                        std::vector<byte> f(k * m);
                        for (auto& y : f) y = static_cast<byte>(rand());
                        std::vector<const byte*> from;
                        std::vector<byte*> ta, tb;
                        for (auto& x : d) from.push_back(x.data() + off);
                        for (auto& x : a) ta.push_back(x.data() + off);
                        for (auto& x : b) tb.push_back(x.data() + off);
                        for (int op = 0; op < 5; ++op) {
                            bool planes = op < 3;
                            if (planes && bytes % 512) continue;
                            Terms x{f.data(), from.data(), k, ta.data(), m, op == 2 || op == 4}, y = x;
                            y.to = tb.data();
                            auto run = [&](const ErasureTier& tier, const Terms& z) {
                                (op == 0  ? tier.encode_planes
                                 : planes ? tier.combine_planes
                                          : tier.combine_bytes)(z, 0, bytes);
                            };
                            run(*t, x);
                            run(kErasureBase, y);
                            ++cases;
                            bad += a != b;
                        }
                    }
        for (unsigned c = 0; c < 256; ++c) {
            std::vector<byte> d(512), a(512), b(512);
            for (auto& y : d) y = rand();
            byte f = c;
            const byte* from = d.data();
            byte *pa = a.data(), *pb = b.data();
            for (int op = 0; op < 2; ++op) {
                Terms x{&f, &from, 1, &pa, 1, false}, y{&f, &from, 1, &pb, 1, false};
                (op ? t->combine_planes : t->combine_bytes)(x, 0, 512);
                (op ? kErasureBase.combine_planes : kErasureBase.combine_bytes)(y, 0, 512);
                ++cases;
                bad += a != b;
            }
        }
        std::printf("%s: ", t->name);
    }
    std::printf("%ld cases, %ld differ from base\n", cases, bad);
    return bad != 0;
}
