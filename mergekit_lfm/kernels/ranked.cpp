// Coins that depend on ranks: the compiled form of `ranked_mask` and `ranked_sums` in random.py, to the bit, for float32.
//
// A row's entries are put into slots by their magnitudes, 1/8 of the slots for each power of two below the largest. Where
// those of a slot are equal, counting them gives their ranks; in the changes of 16-bit models few are not, and are sorted.
// Otherwise all are in order but those that share a slot with others; these are moved.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr uint32_t NOT_A_NUMBER = 0x7F800001;  // all NaNs count as equal, and as larger than infinity
constexpr int FEWEST = 3, MOST = 12;           // slots, as powers of two
constexpr int MOVES = 16;                      // for each entry, before sorting takes less time
constexpr int FEW = 8;                         // a row's part to be sorted, from which on sorting all takes less time

uint32_t magnitude(uint32_t bits) { return std::min(bits & 0x7FFFFFFFu, NOT_A_NUMBER); }

// The slots of a row by falling magnitude, and a last one for all that are smaller.
struct Slots {
    uint32_t number, shift, top = 0;

    Slots(const uint32_t *x, uint32_t row) {
        int digits = FEWEST;
        while (digits < MOST && row >> (digits + 1)) digits++;
        number = 1u << digits, shift = 26 - digits;
        for (uint32_t i = 0; i < row; i++) top = std::max(top, magnitude(x[i]));
        top >>= shift;
    }

    uint32_t of(uint32_t size) const { return std::min(top - (size >> shift), number); }

    // Not 0 if a smaller magnitude belongs to the same slot.
    uint32_t rest(uint32_t size) const { return size & (top - (size >> shift) < number ? (1u << shift) - 1 : ~0u); }
};

// Index in the lower half, sorted by falling magnitude.
uint64_t as_entry(uint32_t bits, uint32_t i) { return uint64_t(NOT_A_NUMBER - magnitude(bits)) << 32 | i; }

// counts -> the sums of those before.
void add_up(uint32_t *counts, uint32_t number) {
    uint32_t start = 0;
    for (uint32_t s = 0; s < number; s++) {
        const uint32_t count = counts[s];
        counts[s] = start;
        start += count;
    }
}

// limit: of each entry, that of its rank. entries: scratch. Both are as long as the row.
void rank_all(const uint32_t *x, uint32_t row, const Slots &slots, const int32_t *limits, uint64_t *entries, int32_t *limit) {
    uint32_t *slot = reinterpret_cast<uint32_t *>(limit);
    for (uint32_t i = 0; i < row; i++) slot[i] = slots.of(magnitude(x[i]));
    uint32_t next[(1 << MOST) + 1];
    std::fill_n(next, slots.number + 1, 0);
    for (uint32_t i = 0; i < row; i++) next[slot[i]]++;
    add_up(next, slots.number + 1);
    for (uint32_t i = 0; i < row; i++) entries[next[slot[i]]++] = as_entry(x[i], i);

    uint64_t moves = 0;
    for (uint32_t i = 1; i < row && moves <= uint64_t(MOVES) * row; i++) {
        const uint64_t entry = entries[i];
        if (entries[i - 1] < entry) continue;
        uint32_t at = i;
        do {
            entries[at] = entries[at - 1];
            at--;
        } while (at && entries[at - 1] > entry);
        entries[at] = entry;
        moves += i - at;
    }
    if (moves > uint64_t(MOVES) * row) std::sort(entries, entries + row);
    for (uint32_t i = 0; i < row; i++) limit[uint32_t(entries[i])] = limits[i];
}

// The same. Entries with a rest are sorted: they are the first of their slots. The others of a slot are equal.
void rank(const uint32_t *x, uint32_t row, const int32_t *limits, uint64_t *entries, int32_t *limit) {
    const Slots slots(x, row);
    const uint32_t apart = slots.number + 1;
    uint32_t *slot = reinterpret_cast<uint32_t *>(limit), count = 0;
    for (uint32_t i = 0; i < row; i++) {
        const uint32_t size = magnitude(x[i]), at = slots.of(size), rest = slots.rest(size);
        slot[i] = rest ? apart : at;
        count += rest ? 1 : 0;
    }
    if (count > row / FEW) return rank_all(x, row, slots, limits, entries, limit);

    uint32_t next[(1 << MOST) + 2];
    std::fill_n(next, apart + 1, 0);
    uint64_t *end = entries;
    for (uint32_t i = 0; i < row; i++) {
        next[slot[i]]++;
        if (slot[i] == apart) *end++ = as_entry(x[i], i);
    }
    std::sort(entries, end);
    const auto slot_of = [&](uint64_t entry) { return slots.of(NOT_A_NUMBER - uint32_t(entry >> 32)); };
    for (uint64_t *each = entries; each < end; each++) next[slot_of(*each)]++;
    next[apart] = 0;
    add_up(next, apart);
    for (uint64_t *each = entries; each < end; each++) {
        const uint32_t place = next[slot_of(*each)]++;
        *each = uint64_t(place) << 32 | uint32_t(*each);
    }
    for (uint32_t i = 0; i < row; i++) limit[i] = limits[next[slot[i]]++];
    for (uint64_t *each = entries; each < end; each++) limit[uint32_t(*each)] = limits[*each >> 32];
}

// The generator's word of two entries, `words` in random.py.
uint64_t word(uint64_t key, int64_t pair) {
    uint64_t z = key + uint64_t(pair + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

int32_t below(uint64_t number, int32_t limit) { return ((int32_t(number) >> 1) - limit) >> 31; }

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

}  // namespace

// mask [rows * row]: all ones for the entries of x that are kept by the coins of the state `key`, whose limits depend on
// the rank in the row. scratch: three times as long as a row. totals: the sums of |x| over all entries and over those
// kept; true if these do not depend on the order.
extern "C" bool ranked_mask(const uint32_t *x, int64_t rows, uint32_t row, uint64_t key, const int32_t *limits,
                            uint32_t *scratch, int8_t *mask, double *totals) {
    uint64_t *entries = reinterpret_cast<uint64_t *>(scratch);
    int32_t *limit = reinterpret_cast<int32_t *>(scratch + 2 * row);
    Sums sums;
    for (int64_t start = 0; start < rows * row; start += row) {
        rank(x + start, row, limits, entries, limit);
        draw(key, start, row, limit);
        std::copy_n(limit, row, mask + start);
        sums.add(x + start, limit, row);
    }
    return sums.write(totals);
}
