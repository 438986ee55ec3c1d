-- Olist: one row per product of the data set.
--
-- Products have neither names nor stock. The category is the English one, or the Portuguese one without a translation.
-- Price and supplier (the seller's id) are those of the last order.
--
-- source olist_products_dataset: olist_products*
-- columns olist_products_dataset: product_id, product_category_name, product_weight_g
-- source product_category_name_translation: product_category_name_translation*
-- columns product_category_name_translation: product_category_name, product_category_name_english
-- source olist_order_items_dataset: olist_order_items*
-- columns olist_order_items_dataset: order_id, order_item_id, product_id, seller_id, shipping_limit_date, price

WITH translations AS (
    SELECT product_category_name, MAX(product_category_name_english) AS english
    FROM product_category_name_translation
    GROUP BY product_category_name
),
sales AS (
    SELECT product_id, seller_id, price,
        ROW_NUMBER() OVER (
            PARTITION BY product_id ORDER BY shipping_limit_date DESC, order_id DESC, order_item_id DESC
        ) AS recency
    FROM olist_order_items_dataset
)
SELECT
    p.product_id,
    coalesce(t.english, nullif(p.product_category_name, '')) AS category,
    s.price,
    s.seller_id AS supplier,
    CASE WHEN try_cast(p.product_weight_g AS DECIMAL(12, 3)) > 0
        THEN CAST(CAST(try_cast(p.product_weight_g AS DECIMAL(12, 3)) / 1000 AS DECIMAL(12, 3)) AS STRING)
    END AS weight_kg,
    p._delivery, p._source_file, p._source_row
FROM olist_products_dataset p
LEFT JOIN translations t ON t.product_category_name = p.product_category_name
LEFT JOIN sales s ON s.product_id = p.product_id AND s.recency = 1
