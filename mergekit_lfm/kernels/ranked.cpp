// Coins that depend on ranks: the compiled form of `ranked_mask` and `ranked_sums` in random.py, to the bit, for float32.
//
// A row's entries are put into slots by their magnitudes, as many slots for each power of two. Where those of a slot are
// equal, counting them gives their ranks; in the changes of 16-bit models few are not, and are sorted. In other rows the
// limits of a slot's first and last rank tell of nearly all of its entries whether they are kept; the rest are counted.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr uint32_t NOT_A_NUMBER = 0x7F800001;  // all NaNs count as equal, and as larger than infinity
constexpr int FEWEST = 3, MOST = 13;           // slots, as powers of two
constexpr int WIDTH = 8;                       // of vectors: slots lie in as many lanes, whose counts are added up at once
constexpr int NEAR = 3, FAR = 5;               // how many powers of two below the largest have slots, as powers of two
constexpr int FEW = 8;                         // a row's part to be sorted, from which on bounds take less time
constexpr uint32_t OPEN = 1000;                // entries to be counted for, from which on sorting takes less time

typedef uint32_t Lanes __attribute__((vector_size(4 * WIDTH)));

uint32_t magnitude(uint32_t bits) { return std::min(bits & 0x7FFFFFFFu, NOT_A_NUMBER); }

// Index in the lower half, sorted by falling magnitude.
uint64_t as_entry(uint32_t bits, uint32_t i) { return uint64_t(NOT_A_NUMBER - magnitude(bits)) << 32 | i; }

// A row, and memory for the work on it, as long as the row.
struct Row {
    const uint32_t *x;
    uint32_t count, top;    // top: the largest magnitude
    const int32_t *limits;  // by rank, falling
    uint64_t *entries;
    uint16_t *slot;
    uint8_t *flag;
    int32_t *limit;  // of each entry: the result
};

// The slots of a row by falling magnitude, each lane of counts an equal part, and a last one for all that are smaller.
struct Slots {
    uint32_t number, shift, top, low;

    Slots(const Row &row, int reach, int finer) {
        int digits = FEWEST;
        while (digits < MOST - finer && row.count >> (digits + 1)) digits++;
        digits += finer;
        number = 1u << digits, shift = 23 + reach - digits, top = row.top >> shift, low = digits - 3;
    }

    uint32_t of(uint32_t size) const {
        const uint32_t at = std::min(top - (size >> shift), number);
        return at < number ? (at & ((1u << low) - 1)) * WIDTH | at >> low : number;
    }

    // Not 0 if a smaller magnitude belongs to the same slot.
    uint32_t rest(uint32_t size) const { return size & (top - (size >> shift) < number ? (1u << shift) - 1 : ~0u); }
};

// counts: of each slot -> the rank of its first entry.
void add_up(uint32_t *counts, uint32_t number) {
    Lanes sum = {}, each;
    for (uint32_t s = 0; s < number; s += WIDTH) {
        std::memcpy(&each, counts + s, sizeof each);
        sum += each;
    }
    uint32_t before = 0;
    for (int lane = 0; lane < WIDTH; lane++) {
        const uint32_t count = sum[lane];
        sum[lane] = before;
        before += count;
    }
    for (uint32_t s = 0; s < number; s += WIDTH) {
        std::memcpy(&each, counts + s, sizeof each);
        std::memcpy(counts + s, &sum, sizeof sum);
        sum += each;
    }
    counts[number] = before;
}

// The generator's word of two entries, `words` in random.py.
uint64_t word(uint64_t key, int64_t pair) {
    uint64_t z = key + uint64_t(pair + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

int32_t below(uint64_t number, int32_t limit) { return ((int32_t(number) >> 1) - limit) >> 31; }

// The numbers of a row that begins at an index of its block.
struct Coins {
    uint64_t key;
    int64_t start;

    void numbers(uint32_t count, int32_t *number) const {
        for (uint32_t i = 0; i < count; i++) {
            const uint64_t both = word(key, (start + i) / 2);
            number[i] = int32_t(both >> ((start + i) % 2 ? 32 : 0)) >> 1;
        }
    }
};

// The masks of the entries from index `start` on, in place of their limits.
void draw(uint64_t key, int64_t start, uint32_t count, int32_t *limit) {
    if (start % 2 && count) {
        *limit = below(word(key, start++ / 2) >> 32, *limit);
        limit++;
        count--;
    }
    for (uint32_t i = 0; i < count / 2; i++) {
        const uint64_t both = word(key, start / 2 + i);
        limit[2 * i] = below(both, limit[2 * i]);
        limit[2 * i + 1] = below(both >> 32, limit[2 * i + 1]);
    }
    if (count % 2) limit[count - 1] = below(word(key, (start + count) / 2), limit[count - 1]);
}

// limit: of each entry, that of its rank.
void rank_by_sorting(const Row &row) {
    for (uint32_t i = 0; i < row.count; i++) row.entries[i] = as_entry(row.x[i], i);
    std::sort(row.entries, row.entries + row.count);
    for (uint32_t i = 0; i < row.count; i++) row.limit[uint32_t(row.entries[i])] = row.limits[i];
}

uint32_t rank_of(const Row &row, uint32_t at) {
    const uint32_t size = magnitude(row.x[at]);
    uint32_t rank = 0;
    for (uint32_t i = 0; i < at; i++) rank += magnitude(row.x[i]) >= size;
    for (uint32_t i = at + 1; i < row.count; i++) rank += magnitude(row.x[i]) > size;
    return rank;
}

// Limits that keep the same entries: the lowest of the slot, but for those that only some limits of the slot would keep.
void rank_by_bounds(const Row &row, const Coins &coins) {
    const Slots slots(row, FAR, 1);
    const uint32_t last = slots.number, count = row.count;
    uint32_t first[(1 << MOST) + 1];
    int32_t low[(1 << MOST) + 1], high[(1 << MOST) + 1];
    for (uint32_t i = 0; i < count; i++) row.slot[i] = slots.of(magnitude(row.x[i]));
    std::fill_n(first, last + 1, 0);
    std::fill_n(low, last + 1, 0);
    for (uint32_t i = 0; i < count; i++) first[row.slot[i]]++;
    std::copy_n(first, last + 1, low);
    add_up(first, last);
    for (uint32_t s = 0; s <= last; s++) {
        const uint32_t end = first[s] + low[s];
        high[s] = row.limits[std::min(first[s], count - 1)];
        low[s] = row.limits[std::max(end, 1u) - 1];
    }
    coins.numbers(row.count, row.limit);
    uint32_t *open = reinterpret_cast<uint32_t *>(row.entries), opened = 0;  // those, and how many
    for (uint32_t i = 0; i < count; i++) {
        const int32_t number = row.limit[i];
        row.limit[i] = low[row.slot[i]];
        open[opened] = i;
        opened += (number >= low[row.slot[i]]) & (number < high[row.slot[i]]);
    }
    if (opened > OPEN) return rank_by_sorting(row);
    for (uint32_t k = 0; k < opened; k++) row.limit[open[k]] = row.limits[rank_of(row, open[k])];
}

// Entries with a rest are sorted: they are the first of their slots. The others of a slot are equal.
void rank(const Row &row, const Coins &coins) {
    const Slots slots(row, NEAR, 0);
    const uint32_t apart = slots.number + 1, count = row.count;
    const uint32_t *x = row.x;
    uint16_t *slot = row.slot;
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t size = magnitude(x[i]), at = slots.of(size), rest = slots.rest(size);
        slot[i] = rest ? apart : at;
    }
    uint32_t rests = 0;
    uint8_t *const flag = row.flag;
    for (uint32_t i = 0; i < count; i++) rests += slot[i] == apart;
    if (rests > count / FEW) return rank_by_bounds(row, coins);

    uint32_t next[(1 << MOST) + 2];
    std::fill_n(next, apart + 1, 0);
    for (uint32_t i = 0; i < count; i++) next[slot[i]]++;
    uint64_t *const entries = row.entries, *end = entries;
    if (rests) {
        for (uint32_t i = 0; i < count; i++) flag[i] = slot[i] == apart;
        uint32_t i = 0;
        for (; i + 8 <= count; i += 8) {
            uint64_t flags;
            std::memcpy(&flags, flag + i, 8);
            for (; flags; flags &= flags - 1) {
                const uint32_t at = i + __builtin_ctzll(flags) / 8;
                *end++ = as_entry(x[at], at);
            }
        }
        for (; i < count; i++)
            if (flag[i]) *end++ = as_entry(x[i], i);
    }
    std::sort(entries, end);
    const auto slot_of = [&](uint64_t entry) { return slots.of(NOT_A_NUMBER - uint32_t(entry >> 32)); };
    for (uint64_t *each = entries; each < end; each++) next[slot_of(*each)]++;
    add_up(next, slots.number);
    for (uint64_t *each = entries; each < end; each++) {
        const uint32_t place = next[slot_of(*each)]++;
        *each = uint64_t(place) << 32 | uint32_t(*each);
    }
    next[apart] = 0;
    int32_t *limit = row.limit;
    const int32_t *limits = row.limits;
    for (uint32_t i = 0; i < count; i++) limit[i] = limits[next[slot[i]]++];
    for (uint64_t *each = entries; each < end; each++) limit[uint32_t(*each)] = limits[*each >> 32];
}

template <class To, class From> To same_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

constexpr uint32_t LANES = 64;  // independent sums, so that the compiler may compute several at once

// Sums of magnitudes, and the largest power of two that divides all of them but zeros, times 2^23.
class Sums {
    double all[LANES] = {}, kept[LANES] = {};
    uint32_t unit[LANES];  // the bits of floats, which are ordered as these

    void add_some(const uint32_t *x, const int32_t *mask, uint32_t count) {
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t bits = x[i] & 0x7FFFFFFF, digits = (bits & 0x7FFFFF) | 0x800000;
            all[i] += same_bits<float>(bits);
            kept[i] += same_bits<float>(bits & mask[i]);
            const float last = float(int32_t(digits & -digits)) * same_bits<float>(bits & 0x7F800000);
            unit[i] = std::min(unit[i], same_bits<uint32_t>(last) - (bits == 0));
        }
    }

public:
    Sums() { std::fill_n(unit, LANES, same_bits<uint32_t>(std::numeric_limits<float>::max())); }

    void add(const uint32_t *x, const int32_t *mask, uint32_t count) {
        uint32_t i = 0;
        for (; i + LANES <= count; i += LANES) add_some(x + i, mask + i, LANES);
        add_some(x + i, mask + i, count - i);
    }

    // Both totals, in some order; true if any order gives these. All partial sums are multiples of the unit. Those up to
    // 2^53 times it are float64 numbers, and a total that is rounded is far from twice the true one.
    bool write(double *totals) const {
        totals[0] = totals[1] = 0;
        uint32_t least = unit[0];
        for (uint32_t i = 0; i < LANES; i++) {
            totals[0] += all[i];
            totals[1] += kept[i];
            least = std::min(least, unit[i]);
        }
        return totals[0] <= std::ldexp(double(same_bits<float>(least)), 52 - 23);
    }
};

// The bits of the difference of two numbers of bfloat16, the upper halves of floats.
uint32_t difference(uint16_t one, uint16_t other) {
    return same_bits<uint32_t>(same_bits<float>(uint32_t(one) << 16) - same_bits<float>(uint32_t(other) << 16));
}

}  // namespace

// mask [rows * row]: all ones for the entries of x that are kept by the coins of the state `key`, whose limits depend on
// the rank in the row. base: null, or x is bfloat16 as this is, and its entries are the differences. scratch: five times
// as long as a row, and 1. totals: the sums of magnitudes over all entries and over those kept; true if these do not
// depend on the order.
extern "C" bool ranked_mask(const void *x, const uint16_t *base, int64_t rows, uint32_t row, uint64_t key,
                            const int32_t *limits, uint32_t *scratch, int8_t *mask, double *totals) {
    uint64_t *entries = reinterpret_cast<uint64_t *>(scratch);
    int32_t *limit = reinterpret_cast<int32_t *>(scratch + 2 * row);
    uint32_t *own = scratch + 3 * row;
    uint16_t *slot = reinterpret_cast<uint16_t *>(scratch + 4 * row);
    uint8_t *flag = reinterpret_cast<uint8_t *>(scratch + 4 * row + (row + 1) / 2);
    Sums sums;
    for (int64_t start = 0; start < rows * row; start += row) {
        const uint32_t *each = base ? own : static_cast<const uint32_t *>(x) + start;
        if (base) {
            const uint16_t *stored = static_cast<const uint16_t *>(x) + start;
            for (uint32_t i = 0; i < row; i++) own[i] = difference(stored[i], base[start + i]);
        }
        uint32_t top = 0;
        for (uint32_t i = 0; i < row; i++) top = std::max(top, magnitude(each[i]));
        rank({each, row, top, limits, entries, slot, flag, limit}, {key, start});
        draw(key, start, row, limit);
        std::copy_n(limit, row, mask + start);
        sums.add(each, limit, row);
    }
    return sums.write(totals);
}
