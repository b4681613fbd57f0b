// Work on several threads: those of torch's own OpenMP runtime where its entry is given, else fresh ones.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// GOMP_parallel(body, data, threads, flags): libgomp and libomp both have it. Taken from the library that torch loaded, so
// that there is one pool of threads and no second runtime to fight it; null makes threads anew at each call.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Calls run() in up to `threads` threads, this one included. Each must take its work from a shared counter: there may be
// fewer threads than were asked for.
template <class F>
void in_threads(int threads, Team team, F& run) {
    if (threads <= 1) return run();
    if (team) return team([](void* data) { (*static_cast<F*>(data))(); }, &run, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(threads);
        for (int i = 1; i < threads; ++i) helpers.emplace_back([&run] { run(); });
    } catch (const std::exception&) {
        // No more threads or memory: those that run do the work.
    }
    run();
    for (std::thread& helper : helpers) helper.join();
}

// Calls work(task, space) for tasks 0..count, each thread in memory of its own from room(); one that gets null leaves the tasks to
// the others.
template <class Room, class F>
void share(int threads, Team team, int64_t count, const Room& room, const F& work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        char* const space = static_cast<char*>(room());
        if (!space) return;
        for (int64_t task; (task = next.fetch_add(1)) < count;) work(task, space);
    };
    in_threads(threads, team, run);
}

// Memory that a thread keeps between calls, at a multiple of a cache line: fresh pages would cost more than the work.
class Scratch {
  public:
    // At least `bytes` bytes, or null. What was there is lost.
    void* get(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
            data_ = std::aligned_alloc(4096, size_);
            if (!data_) size_ = 0;
        }
        return data_;
    }
    ~Scratch() { std::free(data_); }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace
