// Split work over the threads that torch already has.
//
// `team` is GOMP_parallel(function, data, threads, flags) of the OpenMP runtime that torch has loaded (libgomp, libiomp5
// and libomp all export it): no second pool of threads, none that spin beside torch's. Without it, std::thread.
// Pieces of work must be independent: which thread takes which is not fixed, so results do not depend on it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);
static Team team = nullptr;
extern "C" void set_team(Team given) { team = given; }

// body(i) for every 0 <= i < n, on at most `threads` threads.
template <typename F> static void parallel(int64_t n, int64_t threads, const F& body) {
    struct Job {
        std::atomic<int64_t> next;
        int64_t n;
        const F* body;
        static void work(void* data) {
            Job* job = static_cast<Job*>(data);
            for (int64_t i; (i = job->next.fetch_add(1, std::memory_order_relaxed)) < job->n;) (*job->body)(i);
        }
    };
    if (threads > n) threads = n;
    Job job{{0}, n, &body};
    if (threads <= 1) {
        Job::work(&job);
    } else if (team) {
        team(Job::work, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t t = 1; t < threads; t++) others.emplace_back(Job::work, &job);
        Job::work(&job);
        for (auto& thread : others) thread.join();
    }
}
