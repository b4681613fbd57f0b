// Tasks on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace {

// Runs work(task, thread) for all tasks on up to `threads` threads, this one included.
template <class F>
void parallel(int64_t tasks, int threads, const F& work) {
    std::atomic<int64_t> next{0};
    const auto run = [&](int thread) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) work(task, thread);
    };
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(threads);
        for (int i = 1; i < std::min<int64_t>(threads, tasks); ++i) helpers.emplace_back(run, i);
    } catch (const std::exception&) {
        // No more threads or memory: those that run do the work.
    }
    run(0);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace
