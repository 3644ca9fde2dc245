fn main(){println!("{}",runx_core::v())}
