//! The registry: from an address to the extent that holds it. A map of 2 MiB pages answers whether an address is ours
//! without a lock or a write, so that pointers of other allocators pass by at the cost of three loads;
//! the extent itself is found in a sharded table by its first page. An index by region makes what is done to one tag
//! cost in proportion to that tag.

use crate::driver::Addr;
use crate::extent::Extent;
use crate::terms::RegionId;
use dashmap::DashMap;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

/// log2 of a page. Every reservation is aligned to it, so that no two extents share a page.
pub(crate) const PAGE_BITS: u32 = 21;
/// What reservations are aligned to.
pub(crate) const PAGE: u64 = 1 << PAGE_BITS;
/// log2 of a table's entries: three levels of 12 bits and a page make 57 bits of address.
const LEVEL_BITS: u32 = 12;
const ENTRIES: usize = 1 << LEVEL_BITS;
/// No memory lies there or beyond.
pub(crate) const END: u64 = 1 << (3 * LEVEL_BITS + PAGE_BITS);

type Leaf = Box<[AtomicU32]>;
type Middle = Box<[OnceLock<Leaf>]>;

/// A number for every page, 0 where nothing was ever set. Reading is wait-free. (The registry's: 1 + the number of pages back to the extent's first.)
pub(crate) struct Pages(Box<[OnceLock<Middle>]>);

fn table<T: Default>() -> Box<[T]> {
    (0..ENTRIES).map(|_| T::default()).collect()
}

fn index(page: u64, level: u32) -> usize {
    (page >> (LEVEL_BITS * level)) as usize & (ENTRIES - 1)
}

impl Pages {
    /// 0 everywhere.
    pub(crate) fn new() -> Pages {
        Pages(table())
    }

    /// The page's number, unless it is 0.
    pub(crate) fn get(&self, page: u64) -> Option<u32> {
        if page >> (LEVEL_BITS * 3) != 0 {
            return None;
        }
        let leaf = self.0.get(index(page, 2))?.get()?.get(index(page, 1))?.get()?;
        let back = leaf.get(index(page, 0))?.load(Ordering::Acquire);
        (back != 0).then_some(back)
    }

    /// The first page from `page` on whose number is not 0. Where no number was ever set, whole tables are passed over at once.
    fn next_set(&self, mut page: u64) -> Option<u64> {
        while page >> (LEVEL_BITS * 3) == 0 {
            let middle = self.0.get(index(page, 2)).and_then(OnceLock::get);
            let leaf = middle.and_then(|middle| middle.get(index(page, 1))?.get());
            let level = match (middle, leaf) {
                (None, _) => 2,
                (_, None) => 1,
                _ if self.get(page).is_some() => return Some(page),
                _ => 0,
            };
            page = ((page >> (LEVEL_BITS * level)) + 1) << (LEVEL_BITS * level);
        }
        None
    }

    /// Bytes of the tables.
    pub(crate) fn table_bytes(&self) -> usize {
        let middles = self.0.iter().filter_map(OnceLock::get);
        let middle = |middle: &Middle| {
            let leaves = middle.iter().filter(|leaf| leaf.get().is_some()).count();
            ENTRIES * (size_of::<OnceLock<Leaf>>() + leaves * size_of::<AtomicU32>())
        };
        ENTRIES * size_of::<OnceLock<Middle>>() + middles.map(middle).sum::<usize>()
    }

    /// The page's number is 0 again.
    pub(crate) fn clear(&self, page: u64) {
        self.set(page, 0);
    }

    /// Sets the number of a page below 2^36.
    pub(crate) fn set(&self, page: u64, back: u32) {
        let middle = self.0[index(page, 2)].get_or_init(table);
        let leaf = middle[index(page, 1)].get_or_init(table);
        leaf[index(page, 0)].store(back, Ordering::Release);
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pages")
    }
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Registry {
    pages: Pages,
    extents: DashMap<u64, Arc<Extent>>,
    /// First pages of each region's extents. Changed after `extents` when one comes, before it when one goes.
    by_region: DashMap<RegionId, BTreeSet<u64>>,
}

impl Registry {
    /// An empty registry.
    pub(crate) fn new() -> Registry {
        Registry { pages: Pages::new(), extents: DashMap::new(), by_region: DashMap::new() }
    }

    /// Whether the address lies in a page of ours. Wait-free.
    pub(crate) fn owns(&self, addr: Addr) -> bool {
        self.pages.get(addr.0 >> PAGE_BITS).is_some()
    }

    /// The extent that holds `addr`.
    pub(crate) fn find(&self, addr: Addr) -> Option<Arc<Extent>> {
        self.find_page(addr.0 >> PAGE_BITS).filter(|extent| addr.0 < extent.base.0 + extent.size)
    }

    /// The extents that have addresses in a range, by address.
    pub(crate) fn within(&self, range: Range<u64>) -> Vec<Arc<Extent>> {
        let mut found: Vec<Arc<Extent>> = Vec::new();
        let mut page = range.start >> PAGE_BITS;
        while let Some(next) = self.pages.next_set(page).filter(|next| next << PAGE_BITS < range.end) {
            page = next + 1;
            if let Some(extent) = self.find_page(next) {
                page = page_range(&extent).end;
                if extent.base.0 < range.end && range.start < extent.base.0 + extent.size {
                    found.push(extent);
                }
            }
        }
        found
    }

    fn find_page(&self, page: u64) -> Option<Arc<Extent>> {
        let back = self.pages.get(page)?;
        let found = self.extents.get(&(page + 1 - u64::from(back))).map(|extent| Arc::clone(&extent));
        // While pages of one extent are cleared, another may have come to where it began.
        found.filter(|extent| page_range(extent).contains(&page))
    }

    /// Makes the extent findable. False if its addresses are outside what the map can hold.
    pub(crate) fn insert(&self, extent: &Arc<Extent>) -> bool {
        let pages = page_range(extent);
        let first = pages.start;
        if pages.end >> (LEVEL_BITS * 3) != 0 || pages.end - first >= u64::from(u32::MAX) {
            return false;
        }
        self.extents.insert(first, Arc::clone(extent));
        self.by_region.entry(extent.region).or_default().insert(first);
        pages.for_each(|page| self.pages.set(page, (page - first) as u32 + 1));
        true
    }

    /// Makes the extent unfindable.
    pub(crate) fn remove(&self, extent: &Extent) {
        self.clear(extent);
        self.forget(extent);
    }

    /// Nothing leads to the extent any more, and another one may come to its addresses.
    fn clear(&self, extent: &Extent) {
        let pages = page_range(extent);
        if let Some(mut firsts) = self.by_region.get_mut(&extent.region) {
            firsts.remove(&pages.start);
        }
        pages.for_each(|page| self.pages.set(page, 0));
    }

    /// Forgets the extent, unless another one has come to where it began.
    fn forget(&self, extent: &Extent) {
        self.extents.remove_if(&page_range(extent).start, |_, found| std::ptr::eq(&**found, extent));
    }

    /// Every extent of the regions, ordered by address.
    pub(crate) fn extents_of(&self, regions: impl Iterator<Item = RegionId>) -> Vec<Arc<Extent>> {
        let firsts: Vec<u64> = regions
            .filter_map(|id| self.by_region.get(&id))
            .flat_map(|firsts| firsts.iter().copied().collect::<Vec<_>>())
            .collect();
        let mut found: Vec<Arc<Extent>> =
            firsts.iter().filter_map(|first| self.extents.get(first).map(|extent| Arc::clone(&extent))).collect();
        found.sort_by_key(|extent| extent.base);
        found
    }

    /// Bytes of the tables (of the hash tables, about).
    pub(crate) fn table_bytes(&self) -> u64 {
        let entry = size_of::<(u64, Arc<Extent>)>() + size_of::<u64>();
        (self.pages.table_bytes() + self.extents.len() * entry + self.by_region.len() * size_of::<BTreeSet<u64>>())
            as u64
    }

    /// Every extent that `wanted` says, ordered by address.
    pub(crate) fn extents(&self, wanted: impl Fn(&Extent) -> bool) -> Vec<Arc<Extent>> {
        let mut found: Vec<Arc<Extent>> =
            self.extents.iter().filter(|entry| wanted(entry.value())).map(|entry| Arc::clone(entry.value())).collect();
        found.sort_by_key(|extent| extent.base);
        found
    }
}

fn page_range(extent: &Extent) -> std::ops::Range<u64> {
    extent.base.0 >> PAGE_BITS..(extent.base.0 + extent.size).div_ceil(PAGE)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::driver::Device;

    fn extent(base: u64, size: u64) -> Arc<Extent> {
        extent_of(0, base, size)
    }

    fn extent_of(region: u32, base: u64, size: u64) -> Arc<Extent> {
        Extent::new(Addr(base), (size, size, size), Device(0), RegionId(region), None).0
    }

    /// The twin is the scan over everything.
    #[test]
    fn the_index_finds_what_a_scan_finds() {
        let registry = Registry::new();
        let extents: Vec<_> = (0..300).map(|i| extent_of(i % 7, u64::from((i * 89) % 300) * PAGE, PAGE)).collect();
        extents.iter().for_each(|extent| assert!(registry.insert(extent)));
        extents.iter().step_by(3).for_each(|extent| registry.remove(extent));
        for wanted in [vec![], vec![3], vec![6, 1], vec![9]] {
            let bases = |found: Vec<Arc<Extent>>| found.iter().map(|extent| extent.base).collect::<Vec<_>>();
            let scan = registry.extents(|extent| wanted.contains(&extent.region.0));
            assert_eq!(bases(registry.extents_of(wanted.iter().map(|&id| RegionId(id)))), bases(scan), "{wanted:?}");
        }
    }

    #[test]
    fn interior_addresses_find_their_extent() {
        let registry = Registry::new();
        let (a, b) = (extent(PAGE * 7, PAGE * 5000), extent((1 << 57) - 2 * PAGE, 4096));
        assert!(registry.insert(&a) && registry.insert(&b));
        for (addr, found) in [(PAGE * 7, &a), (PAGE * 5006 + 99, &a), ((1 << 57) - 2 * PAGE + 4095, &b)] {
            assert!(registry.owns(Addr(addr)));
            assert_eq!(registry.find(Addr(addr)).map(|e| e.base), Some(found.base));
        }
        for addr in [0, PAGE * 6, PAGE * 5007, (1 << 57) - 2 * PAGE + 4096, u64::MAX] {
            assert!(registry.find(Addr(addr)).is_none());
        }
        assert!(!registry.owns(Addr(u64::MAX)) && !registry.owns(Addr(PAGE * 5007)));
        registry.remove(&a);
        assert!(!registry.owns(Addr(PAGE * 7)) && registry.find(Addr(PAGE * 8)).is_none());
        assert_eq!(registry.extents(|_| true).len(), 1);
    }

    /// A program may map memory where it has unmapped some as soon as nothing is found there. The removal of the old extent took the new one's entry.
    #[test]
    fn an_extent_that_goes_leaves_its_successor() {
        let registry = Registry::new();
        let (old, new) = (extent(PAGE * 7, PAGE * 3), extent(PAGE * 7, PAGE));
        assert!(registry.insert(&old));
        registry.clear(&old);
        assert!(registry.within(0..u64::MAX).is_empty());
        assert!(registry.insert(&new));
        registry.forget(&old);
        assert_eq!(registry.find(Addr(PAGE * 7)).map(|found| found.size), Some(PAGE));
    }

    /// A range whose length is garbage was looked through page by page, for hours.
    #[test]
    fn an_enormous_range_is_looked_through_at_once() {
        let registry = Registry::new();
        let extents =
            [PAGE * 7, PAGE * 4096, (1 << 46) - PAGE, 1 << 46, (1 << 57) - 2 * PAGE].map(|at| extent(at, PAGE));
        extents.iter().for_each(|extent| assert!(registry.insert(extent)));
        let bases = |range: Range<u64>| registry.within(range).iter().map(|found| found.base.0).collect::<Vec<_>>();
        assert_eq!(bases(0..u64::MAX), extents.iter().map(|extent| extent.base.0).collect::<Vec<_>>());
        assert_eq!(bases(PAGE * 8..u64::MAX).len(), 4);
        assert_eq!(bases(PAGE * 4096 + 1..(1 << 46) + 1), [PAGE * 4096, (1 << 46) - PAGE, 1 << 46]);
        assert_eq!(bases((1 << 57)..u64::MAX), [0; 0]);
    }

    #[test]
    fn addresses_beyond_the_map_are_refused() {
        assert!(!Registry::new().insert(&extent(1 << 57, PAGE)));
    }
}
