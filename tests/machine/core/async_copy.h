// cp.async: copies from global to shared memory that land between their issue and their wait.
#pragma once
#include "machine.h"

namespace machine {

// Lets all groups but the last `keep` land, and with `open` those of no group, too.
void land_copies(Warp& warp, size_t keep, bool open);

}  // namespace machine
